// Copies of tokens to the rows of experts, and sums of rows back to tokens: gathers both, never a scatter.
#include "vector.h"

extern "C" void gather_rows(const float* from, const int64_t* index, float* to, int64_t rows, int64_t dim) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * dim, from + index[row] * dim, dim * sizeof(float));
}

// to[token] = sum over its choices of from[origin[token][choice]], in the order of choices.
extern "C" void sum_rows(const float* from, const int64_t* origin, float* to, int64_t tokens, int64_t chosen,
                         int64_t dim) {
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t* rows = origin + token * chosen;
    float* sum = to + token * dim;
    std::memcpy(sum, from + rows[0] * dim, dim * sizeof(float));
    for (int64_t choice = 1; choice < chosen; ++choice) {
      const float* row = from + rows[choice] * dim;
      for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
    }
  }
}
