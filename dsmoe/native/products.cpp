// What a core sustains of matrix products of one shape, its operands in the cache: to choose and to judge kernels by.

#include "kernels.h"

struct Products {
  int64_t bf16, M, N, K;
};

namespace {

template <class T>
void products_of(const Products& p, int64_t count, int64_t* next) {
  struct Space {
    T *a, *b;
    float* c;
  };
  auto layout = [&](Workspace& memory) {
    return Space{memory.take<T>(p.M * p.K), memory.take<T>(p.K * p.N), memory.take<float>(p.M * p.N)};
  };
  each_item(count, next, layout, [&](int64_t, const Space& space) {
    if (space.a[0] != T{1}) std::fill_n(space.a, p.M * p.K, T{1}), std::fill_n(space.b, p.K * p.N, T{1});
    multiply(p.M, p.N, p.K, Matrix<T>{space.a, p.K}, Matrix<T>{space.b, p.N}, space.c, p.N);
  });
}

}  // namespace

// An item is a product [M][K] times [K][N]; K is even.
extern "C" void dsmoe_products(const Products* products, const void*, int64_t count, int64_t* next) {
  (products->bf16 ? products_of<Half> : products_of<float>)(*products, count, next);
}
