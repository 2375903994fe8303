// What each thread of a team does with a kernel: take items until none is left. `dsmoe.native.run` gives it to a team.

#include <cstdio>
#include <exception>
#include <new>

#include "brgemm.h"

namespace {
enum Failure : int32_t { NONE, NO_MEMORY, OTHER };
}

struct Call {
  void (*kernel)(const void* arguments, const void* items, int64_t count, int64_t* next);
  const void *arguments, *items;
  int64_t count, next;
  int32_t failure;    // of any thread
  char message[256];  // torch's
};

extern "C" void dsmoe_share(Call* call) {
  int32_t none = NONE;
  auto fail = [&](int32_t failure) {
    return __atomic_compare_exchange_n(&call->failure, &none, failure, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  };
  try {
    call->kernel(call->arguments, call->items, call->count, &call->next);
  } catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
  } catch (const std::exception& error) {
    if (fail(OTHER)) std::snprintf(call->message, sizeof call->message, "%s", error.what());
  }
  at::native::cpublas::brgemm_release(true);  // the tile registers, which torch's own products set for themselves
}
