// What each thread of a team does with a kernel: take items until none is left. `dsmoe.native.run` gives it to a team.

#include <cstdint>

struct Call {
  int (*kernel)(const void* arguments, const void* items, int64_t count, int64_t* next);
  const void *arguments, *items;
  int64_t count, next;
  int32_t failed;  // whether any thread found no memory to work in
};

extern "C" void dsmoe_share(Call* call) {
  if (call->kernel(call->arguments, call->items, call->count, &call->next))
    __atomic_store_n(&call->failed, 1, __ATOMIC_RELAXED);
}
