// CUDA tensors without CUDA, in a torch that is built for CPUs: they lie in host memory, and the dispatch key CUDA has a
// fallback that calls the CPU's kernel over the same memory. So data pointers, strides, views and autograd are real, and
// what this library refuses or reports is what a GPU would refuse or wait for:
//
//   tensors of two devices in one operator; operands that CUDA's grouped_mm does not take; tensors NCCL does not take
//   "sync": the host waits for the device       "h2d": a blocking copy from the host, which waits as well
//   an asynchronous copy to pinned memory is garbage until its event or stream has been waited for, and reads its source
//   as late as it may; what a collective receives is garbage until it has been waited for, and what it sends may not
//   change until then; a side stream may read only what its last wait for the default stream covers
//
// `pretended.py` compiles and loads it.
#include <ATen/ATen.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>

namespace {
using namespace at;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::StreamId;

constexpr DeviceIndex DEVICES = 8;
thread_local DeviceIndex current = 0;
thread_local std::array<StreamId, DEVICES> streams{};  // current, by device; 0 is the default
std::mutex lock;

using Listener = void (*)(const char* kind, const char* op, const char* detail);
Listener listener = nullptr;
std::map<std::string, long> counts;  // calls of each operator
std::set<DeviceIndex> used;          // devices that have run one

void tell(const char* kind, const std::string& op, const std::string& detail = "") {
  if (listener) listener(kind, op.c_str(), detail.c_str());
}

// --- pinned memory ---------------------------------------------------------------------------------------------------
std::map<const char*, size_t> pinned;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  return after != pinned.begin() && static_cast<const char*>(data) < std::prev(after)->first + std::prev(after)->second;
}

void unpin(void* data) {
  {
    std::lock_guard<std::mutex> guard(lock);
    pinned.erase(static_cast<const char*>(data));
  }
  free(data);
}

struct Pinned final : HostAllocator {
  DataPtr allocate(size_t bytes) override {
    void* data = aligned_alloc(64, (bytes + 64) / 64 * 64);
    std::lock_guard<std::mutex> guard(lock);
    pinned[static_cast<char*>(data)] = std::max<size_t>(bytes, 1);
    return {data, data, &unpin, Device(kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
Pinned pinned_allocator;

// --- streams and events ------------------------------------------------------------------------------------------------
struct Transfer {  // to pinned memory, under way
  Tensor to, from;
  bool done = false;
  void finish() {
    if (!std::exchange(done, true)) to.copy_(from);
  }
};
struct StreamState {
  std::vector<std::shared_ptr<Transfer>> under_way;
  long covers = 0;  // operators of the default stream that the last wait for it covers
};
std::map<StreamId, StreamState> states;
StreamId newest = 0;
std::atomic<long> launched{0};  // operators on default streams

struct Event {
  std::vector<std::shared_ptr<Transfer>> before;
  long covers;
};

void finish(std::vector<std::shared_ptr<Transfer>>& transfers) {
  c10::InferenceMode no_grad(false);
  for (auto& transfer : transfers) transfer->finish();
  transfers.clear();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCUDA; }
  Device getDevice() const override { return Device(kCUDA, current); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream stream_of(Device device, StreamId id) const noexcept {
    return c10::Stream(c10::Stream::UNSAFE, Device(kCUDA, device.index() < 0 ? current : device.index()), id);
  }
  c10::Stream getStream(Device device) const noexcept override {
    return stream_of(device, streams[device.index() < 0 ? current : device.index()]);
  }
  c10::Stream getDefaultStream(Device device) const override { return stream_of(device, 0); }
  c10::Stream getNewStream(Device device, int) const override {
    std::lock_guard<std::mutex> guard(lock);
    return stream_of(device, ++newest);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    c10::Stream before = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::mutex> guard(lock);
    if (!*event) *event = new Event;
    auto& state = states[stream.id()];
    *static_cast<Event*>(*event) = {state.under_way, stream.id() ? state.covers : launched.load()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::lock_guard<std::mutex> guard(lock);
    auto& state = states[stream.id()];
    auto& known = static_cast<Event*>(event)->before;
    state.under_way.insert(state.under_way.end(), known.begin(), known.end());
    state.covers = std::max(state.covers, static_cast<Event*>(event)->covers);
  }
  bool queryEvent(void* event) const override {
    for (auto& transfer : static_cast<Event*>(event)->before)
      if (!transfer->done) return false;
    return true;
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void synchronizeEvent(void* event) const override {
    tell("wait", "event");
    if (event) finish(static_cast<Event*>(event)->before);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    tell("wait", "stream");
    finish(states[stream.id()].under_way);
  }
  void synchronizeDevice(const DeviceIndex) const override {
    tell("wait", "device");
    for (auto& [_, state] : states) finish(state.under_way);
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar registered(kCUDA, &guard);

// --- one memory, two devices -------------------------------------------------------------------------------------------
c10::Storage over(const c10::Storage& storage, Device device) {
  auto* owner = new c10::Storage(storage);
  c10::DataPtr data(storage.data_ptr().get(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(kCPU), true);
}

Tensor make(const c10::Storage& storage, const Tensor& like, Device device) {
  auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

SparseTensorImpl* sparse_of(const Tensor& tensor) { return static_cast<SparseTensorImpl*>(tensor.unsafeGetTensorImpl()); }

// The tensors of one call, here and there.
struct Call {
  std::unordered_map<c10::TensorImpl*, std::pair<Tensor, Tensor>> tensors;  // an operand on the host: it, the device's
  std::unordered_map<c10::StorageImpl*, c10::Storage> memory;  // likewise
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts;   // the other way round

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    if (tensor.is_sparse()) {
      auto* sparse = sparse_of(tensor);
      auto made = at::_sparse_coo_tensor_unsafe(host(sparse->indices()), host(sparse->values()), tensor.sizes(),
                                                tensor.options().device(kCPU));
      sparse_of(made)->set_coalesced(sparse->coalesced());
      return tensors.emplace(made.unsafeGetTensorImpl(), std::pair(made, tensor)), made;
    }
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto place = hosts.find(key);
    if (place == hosts.end()) {
      place = hosts.emplace(key, over(tensor.storage(), Device(kCPU))).first;
      memory.emplace(place->second.unsafeGetStorageImpl(), tensor.storage());
    }
    auto made = make(place->second, tensor, Device(kCPU));
    tensors.emplace(made.unsafeGetTensorImpl(), std::pair(made, tensor));
    return made;
  }

  c10::Storage on_device(const Tensor& tensor, DeviceIndex index) {
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto known = memory.find(key);
    if (known == memory.end()) known = memory.emplace(key, over(tensor.storage(), Device(kCUDA, index))).first;
    return known->second;
  }

  Tensor device(const Tensor& tensor, DeviceIndex index) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    auto operand = tensors.find(tensor.unsafeGetTensorImpl());
    if (operand != tensors.end()) return operand->second.second;
    if (tensor.is_sparse()) {
      auto* sparse = sparse_of(tensor);
      auto indices = device(sparse->indices(), index), values = device(sparse->values(), index);
      auto made = at::detail::make_tensor<SparseTensorImpl>(
          c10::DispatchKeySet(c10::DispatchKey::SparseCUDA), tensor.dtype());
      auto* impl = sparse_of(made);
      impl->resize_(sparse->sparse_dim(), sparse->dense_dim(), tensor.sizes());
      impl->set_indices_and_values_unsafe(indices, values);
      impl->set_coalesced(sparse->coalesced());
      return made;
    }
    return make(on_device(tensor, index), tensor, Device(kCUDA, index));
  }

  // Operands that an operator has given another size, and other memory if it had to.
  void follow() {
    for (auto& [key, host] : hosts) {
      auto* original = memory.at(host.unsafeGetStorageImpl()).unsafeGetStorageImpl();
      if (host.data() == original->data()) continue;
      original->set_data_ptr_noswap(c10::DataPtr(host.data_ptr().get(), new c10::Storage(host),
          [](void* p) { delete static_cast<c10::Storage*>(p); }, original->device()));
      original->set_nbytes(host.nbytes());
    }
    for (auto& [impl, pair] : tensors) {
      auto& original = pair.second;
      if (original.is_sparse()) continue;
      auto* kept = original.unsafeGetTensorImpl();
      if (impl->sizes() != kept->sizes() || impl->strides() != kept->strides() ||
          impl->storage_offset() != kept->storage_offset())
        kept->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
    }
  }
};

template <typename F>
IValue each_tensor(const IValue& value, F&& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    return changed;
  }
  if (value.isList() && !value.toList().empty() && value.toList().get(0).isTensorList()) {
    auto list = value.toList();  // of lists, as collectives have them
    c10::impl::GenericList changed(list.elementType());
    for (const IValue& item : value.toListRef()) changed.push_back(each_tensor(item, change));
    return changed;
  }
  return value;
}

// --- every operator ----------------------------------------------------------------------------------------------------
const std::set<std::string> WAITS{
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "is_nonzero", "repeat_interleave", "argwhere", "linalg_lstsq", "histc"};
// They make memory or look at it in another way, and launch nothing.
const std::set<std::string> NO_KERNEL{
    "empty", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "resize_", "alias", "set_", "_indices",
    "_values", "_coalesced_", "_sparse_coo_tensor_with_dims_and_tensors", "_nnz", "is_coalesced", "sparse_dim",
    "dense_dim", "view_as_real", "view_as_complex", "detach"};
const std::set<std::string> TAKES_HOST_INDEX{"index", "index_put", "index_put_", "_index_put_impl_"};

void launch(const std::string& name, DeviceIndex index) {
  std::lock_guard<std::mutex> guard(lock);
  ++counts[name];
  used.insert(index);
  if (!streams[index]) ++launched;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  const size_t given = schema.arguments().size();
  std::vector<IValue> arguments(stack->end() - given, stack->end());
  stack->resize(stack->size() - given);

  DeviceIndex index = -1;
  bool on_host = false, masks = false;
  for (const IValue& argument : arguments)
    each_tensor(argument, [&](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      masks |= tensor.scalar_type() == kBool || tensor.scalar_type() == kByte;
      if (tensor.is_cuda()) {
        TORCH_CHECK(index < 0 || index == tensor.get_device(), name, ": Expected all tensors to be on the same device, ",
                    "but found cuda:", int(index), " and ", tensor.device());
        index = tensor.get_device();
      } else {
        on_host |= tensor.dim() > 0;
      }
      return tensor;
    });
  TORCH_CHECK(index < 0 || !on_host || TAKES_HOST_INDEX.count(name), name,
              ": Expected all tensors to be on the same device, but found cuda:", int(index), " and cpu");
  if (index < 0) {
    for (const IValue& argument : arguments)
      if (argument.isDevice() && argument.toDevice().is_cuda()) index = argument.toDevice().index();
    if (index < 0) index = current;
  }
  if (!NO_KERNEL.count(name)) launch(name, index);
  bool waits = WAITS.count(name);
  if (name == "repeat_interleave") waits = arguments.back().isNone();
  if (TAKES_HOST_INDEX.count(name)) {
    bool mask = false;
    each_tensor(arguments[1], [&](const Tensor& t) {
      mask |= t.defined() && (t.scalar_type() == kBool || t.scalar_type() == kByte);
      return t;
    });
    waits = mask || on_host;
  }
  if (waits) tell("sync", name);

  Call call;
  for (size_t i = 0; i < given; ++i) {
    IValue& argument = arguments[i];
    if (argument.isDevice()) argument = Device(kCPU);
    else if (schema.arguments()[i].name() == "pin_memory" && argument.isBool()) argument = false;
    else argument = each_tensor(argument, [&](const Tensor& tensor) { return call.host(tensor); });
    stack->push_back(argument);
  }
  op.callBoxed(stack);
  call.follow();
  const size_t returned = schema.returns().size();
  for (size_t i = stack->size() - returned; i < stack->size(); ++i)
    (*stack)[i] = each_tensor((*stack)[i], [&](const Tensor& tensor) { return call.device(tensor, index); });
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Call call;
  launch("copy_", (self.is_cuda() ? self : source).get_device());
  auto to = call.host(self), from = call.host(source);
  if (self.is_cuda() || !source.is_cuda()) {
    if (!source.is_cuda() && source.dim() && !(non_blocking && is_pinned(source.const_data_ptr()))) tell("h2d", "copy_");
    to.copy_(from);
    return self;
  }
  if (!non_blocking || !is_pinned(self.const_data_ptr())) {
    tell("sync", "copy_ to host");
    to.copy_(from);
    return self;
  }
  const StreamId stream = streams[source.get_device()];
  std::lock_guard<std::mutex> guard(lock);
  auto& state = states[stream];
  TORCH_CHECK(!stream || state.covers >= launched, "copy_: a side stream reads what its last wait does not cover");
  TORCH_CHECK(to.is_contiguous(), "copy_: pinned memory with gaps");
  memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
  state.under_way.push_back(std::make_shared<Transfer>(Transfer{to, from}));
  return self;
}

bool leaves_garbage = false;

Tensor grouped_mm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& offs, const std::optional<Tensor>& bias,
                  std::optional<ScalarType> out_dtype) {
  for (auto& [matrix, name] : {std::pair(a, "mat_a"), std::pair(b, "mat_b")}) {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0, "expected data_ptr of ", name,
                " to be aligned to 16 bytes, at element ", matrix.storage_offset());
    const int64_t last = matrix.dim() - 1, alignment = 16 / matrix.element_size();
    auto stride = matrix.strides(), size = matrix.sizes();
    const bool rows = stride[last] == 1 && stride[last - 1] >= std::max<int64_t>(1, size[last]);
    const bool columns = stride[last - 1] == 1 && stride[last] >= std::max<int64_t>(1, size[last - 1]);
    TORCH_CHECK(rows || columns, "Invalid strides/sizes, got ", stride, " for strides and ", size, " for sizes of ", name);
    TORCH_CHECK(stride[rows ? last - 1 : last] % alignment == 0, "strides of ", name,
                " should be multiple of 16 bytes, got ", stride);
  }
  const int64_t groups = offs ? offs->numel() : a.size(0);
  TORCH_CHECK(groups < 1024, "Can't process more than 1024 groups");
  TORCH_CHECK(!offs || (offs->scalar_type() == kInt && offs->is_cuda()), "Offsets have to be int32 on the device");
  TORCH_CHECK(a.get_device() == b.get_device(), "grouped_mm: Expected all tensors to be on the same device");
  if (a.scalar_type() != kBFloat16) {
    tell("fallback", "_grouped_mm", c10::toString(a.scalar_type()));  // one call an expert, and a wait for the offsets
  } else if (a.dim() == 2 && b.dim() == 2 && !(a.stride(-1) != 1 && b.stride(-1) == 1)) {
    // CUTLASS describes each group's slice of K with TMA: in another layout its start must lie on 16 bytes.
    auto ends = Call().host(*offs).to(kLong);
    auto sizes = at::diff(ends, 1, -1, at::zeros({1}, ends.options()));
    TORCH_CHECK((sizes > 0).all().item<bool>() && (ends % 8 == 0).all().item<bool>(),
                "grouped_mm: a weight gradient in a layout that asserts on the device for these group sizes");
  }
  launch("_grouped_mm", a.get_device());
  Call call;
  auto ends = offs ? std::optional<Tensor>(call.host(*offs)) : std::nullopt;
  Tensor product = at::_grouped_mm(call.host(a), call.host(b), ends, bias, out_dtype);
  if (leaves_garbage && a.dim() == 2 && b.dim() == 2) {  // a weight gradient on sm_100, pytorch/pytorch#172439
    int64_t begin = 0;
    for (int64_t group = 0; group < product.size(0); ++group) {
      const int64_t end = ends->select(0, group).item<int>();
      if (begin == end) product.select(0, group).fill_(NAN);
      begin = end;
    }
  }
  return call.device(product, a.get_device());
}

void record_stream(Tensor&, c10::Stream) {}

int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // the plain formula, which is the same on every device
}

Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  if (strides.empty()) {
    strides.resize(sizes.size());
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  }
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(c10::Storage(source.storage()));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// --- collectives, as NCCL has them -------------------------------------------------------------------------------------
struct Pending final : c10d::Work {
  c10::intrusive_ptr<c10d::Work> inner;
  std::vector<std::pair<Tensor, Tensor>> received, sent;  // (device's memory, hidden copy)
  std::string name;
  bool waited = false;

  bool wait(std::chrono::milliseconds timeout) override {
    if (std::exchange(waited, true)) return true;
    inner->wait(timeout);
    for (auto& [now, then] : sent)
      TORCH_CHECK(memcmp(now.const_data_ptr(), then.const_data_ptr(), then.nbytes()) == 0, name,
                  ": what is sent has changed before the exchange was waited for");
    for (auto& [to, from] : received) to.copy_(from);
    return true;
  }
  bool isCompleted() override { return waited; }
  void synchronize() override { wait(kNoTimeout); }
  ~Pending() override {
    if (!waited) tell("never waited", name);
  }
};

// One thread at a time may use a communicator.
std::map<const void*, std::thread::id> communicators;

struct Using {
  const void* group;
  Using(const c10d::ProcessGroup* group, const std::string& name) : group(group) {
    std::lock_guard<std::mutex> guard(lock);
    TORCH_CHECK(communicators.emplace(group, std::this_thread::get_id()).second, name,
                ": two threads use one communicator at once");
  }
  ~Using() {
    std::lock_guard<std::mutex> guard(lock);
    communicators.erase(group);
  }
};

void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto pending = c10::make_intrusive<Pending>();
  pending->name = schema.name();
  const size_t given = schema.arguments().size();
  std::vector<IValue> arguments(stack->end() - given, stack->end());
  stack->resize(stack->size() - given);
  std::string shapes, splits;
  std::optional<ScalarType> dtype;
  int64_t elements = 0;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  for (size_t i = 0; i < given; ++i) {
    const std::string& name = schema.arguments()[i].name();
    if (name == "process_group") group = arguments[i].toCustomClass<c10d::ProcessGroup>();
    if (name == "output_split_sizes" || name == "input_split_sizes") {
      const auto sizes = arguments[i].toIntVector();
      splits += " " + c10::str(IntArrayRef(sizes));
    }
  }
  Using one(group.get(), pending->name);
  Call call;
  for (size_t i = 0; i < given; ++i) {
    const bool output = i == 0 && schema.name() != "c10d::send";
    stack->push_back(each_tensor(arguments[i], [&](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      TORCH_CHECK(tensor.is_cuda(), pending->name, ": NCCL takes no tensor of the CPU");
      TORCH_CHECK(tensor.is_contiguous(), pending->name, ": NCCL takes contiguous tensors, found strides ", tensor.strides());
      TORCH_CHECK(!dtype || *dtype == tensor.scalar_type(), pending->name, ": NCCL takes one dtype, found two");
      dtype = tensor.scalar_type();
      shapes += std::string(output ? " out" : " in") + c10::str(tensor.sizes().slice(tensor.dim() ? 1 : 0)) +
                c10::toString(tensor.scalar_type()) + "@" + c10::str(tensor.device());
      elements += tensor.numel();
      auto real = call.host(tensor), hidden = real.clone();
      (output ? pending->received : pending->sent).emplace_back(real, hidden);
      return hidden;
    }));
  }
  tell("collective", schema.name(), shapes);
  tell("communicator", schema.name(), c10::str(group->getGroupName(), "|", group->getSize(), "|", group->getRank(), "|",
       dtype ? c10::toString(*dtype) : "", "|", splits.empty() ? c10::str(elements) : splits));
  op.callBoxed(stack);
  const size_t returned = schema.returns().size();
  if (!returned) return;
  pending->inner = stack->back().toCustomClass<c10d::Work>();
  // In place, a rank's own part of what it receives is what it sends: NCCL allows that.
  auto overlaps = [&](const std::pair<Tensor, Tensor>& sent) {
    auto* begin = static_cast<const char*>(sent.first.const_data_ptr());
    for (auto& [real, hidden] : pending->received) {
      auto* other = static_cast<const char*>(real.const_data_ptr());
      if (begin < other + real.nbytes() && other < begin + sent.first.nbytes()) return true;
    }
    return false;
  };
  pending->sent.erase(std::remove_if(pending->sent.begin(), pending->sent.end(), overlaps), pending->sent.end());
  for (auto& [real, hidden] : pending->received)
    if (real.nbytes()) memset(real.mutable_data_ptr(), 0xFF, real.nbytes());
  stack->back() = IValue(c10::static_intrusive_pointer_cast<c10d::Work>(pending));
  if (returned > 1) (*stack)[stack->size() - 2] = each_tensor((*stack)[stack->size() - 2], [&](const Tensor& tensor) {
      for (auto& [real, hidden] : pending->received)
        if (hidden.is_same(tensor)) return call.tensors.at(real.unsafeGetTensorImpl()).second;
      return tensor;
    });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Those that have a kernel for sparse tensors and, for want of one, another that suits dense tensors alone.
TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) {
  for (const char* name : {"sparse_dim", "dense_dim", "_nnz", "is_coalesced", "_to_dense", "add.Tensor", "add_.Tensor",
                           "add.out", "_coalesce", "_coalesced_", "mul.Tensor", "clone", "zero_", "sum", "neg"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &copy_);
  m.impl("_grouped_mm", &grouped_mm);
  m.impl("record_stream", &record_stream);
  m.impl("_fused_sdp_choice", &fused_sdp_choice);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "_allgather_base_", "allgather_",
                           "allgather_into_tensor_coalesced_", "_reduce_scatter_base_", "reduce_scatter_",
                           "reduce_scatter_tensor_coalesced_", "alltoall_base_", "alltoall_", "gather_", "scatter_",
                           "barrier", "send", "recv_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}
}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return DEVICES; }
  int getNumGPUs() const override { return DEVICES; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};
}  // namespace at

extern "C" {
void pretended_listen(Listener to) { listener = to; }
void pretended_start() {
  at::setHostAllocator(at::kCUDA, &pinned_allocator, 255);
  // torch has asked for its hooks by the time this library is loaded, and keeps what it was given: an object without
  // members. It gets the methods of ours.
  static const at::CUDAHooks ours({});
  auto* kept = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(kept) = *reinterpret_cast<void* const*>(&ours);
}
void pretended_blackwell(int yes) { leaves_garbage = yes; }
// A bit for each device that has run an operator.
long pretended_devices() {
  long bits = 0;
  for (DeviceIndex index : used) bits |= 1L << index;
  return bits;
}
// "name count" lines since the last call; `text` has room for `size` bytes.
void pretended_take_counts(char* text, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  std::string all;
  for (auto& [name, count] : counts) all += name + " " + std::to_string(count) + "\n";
  counts.clear();
  strncpy(text, all.c_str(), size - 1);
}
}
