// What gemv_mma.cu and gemv_mma_many.cu share: the call, its division among clusters of blocks, where weights lie.
//
// Blocks are divided among jobs (matrices of one format over the same columns of x) by bytes; a block, or a cluster
// that divides the columns of K, takes a run of 16-row tiles. The warps of a block share the units of this run
// (units.cuh), each with a ring of its own under way (ring.cuh).
#pragma once

#include "common/cluster.cuh"
#include "common/launch.cuh"
#include "common/overlap.cuh"
#include "gemm/ring.cuh"

namespace dsv4 {
namespace gemv {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSlots = 2;
constexpr int kStretch = 256;  // columns: K is divided among blocks and warps in multiples of it
constexpr int kFewTokens = 8;
constexpr int kMaxTokens = 32;
constexpr int kMaxMatrices = 8;
constexpr int kMaxJobs = 16;
constexpr int kMaxSplitBits = 3;
constexpr int kRingBytes = kWarps * kSlots * kUnitShared;
constexpr int kRingBarriers = kWarps * kSlots;
constexpr int kMaxShared = 227 * 1024;

struct Matrix {
  const uint8_t* data;
  const void* scales;  // NVFP4: the global scale, f32; FP8: of the blocks
  void* out;           // [T, rows] of this matrix, `stride` elements between tokens
  int64_t stride;
  int rows;
  int first_tile;  // of the job's tiles
  bool out_f32, e8m0;
};

// Matrices of one format that read the same columns of x.
struct Job {
  Kind kind;
  int first_matrix, matrices;
  int first_tile, tiles;
  int first_cluster, clusters;
  int column;       // of x
  int each, more;   // tiles of a cluster; the first `more` clusters have one more

  int most_tiles() const { return (tiles + clusters - 1) / clusters; }
};

struct Gemv {
  const bf16* x;
  int64_t x_stride;
  const float* token_scale;  // [T] or null
  int tokens, columns;       // of a matrix: K
  int split_bits;            // 2^split_bits blocks of a cluster divide K
  bool overlap;
  int jobs;
  Job job[kMaxJobs];
  Matrix matrix[kMaxMatrices];
  int matrices;
  int span_bits;  // more than 8 tokens: 2^span_bits warps of a block divide its columns

  __host__ __device__ int splits() const { return 1 << split_bits; }
  // Stretches of a row tile, and the most of them that one block has.
  __host__ __device__ int stretches() const { return (columns + kStretch - 1) / kStretch; }
  __host__ __device__ int most_stretches() const { return (stretches() + splits() - 1) >> split_bits; }
};

// Of tokens and matrices, in shared memory.
struct Head {
  uint32_t largest[kMaxTokens];   // more than 8 tokens: magnitude,
  float inverse[kMaxTokens];      // and the inverse of what a token was scaled by
  float token_scale[kMaxTokens];  // if there is one
  float global_scale[kMaxMatrices];
};

// A block's part of a job: row tiles, and of each the same stretches of K.
struct Run {
  int first_tile, tiles, first_stretch, stretches;

  __device__ Run(const Gemv& p, const Job& job, int cluster, int rank) {
    first_tile = job.first_tile + cluster * job.each + min(cluster, job.more);
    tiles = job.each + (cluster < job.more);
    const int all = p.stretches();
    first_stretch = (all * rank) >> p.split_bits;
    stretches = ((all * (rank + 1)) >> p.split_bits) - first_stretch;
  }
};

__device__ inline const Job& job_of_block(const Gemv& p) {
  int j = 0;
  while (j + 1 < p.jobs && int(blockIdx.x >> p.split_bits) >= p.job[j + 1].first_cluster) ++j;
  return p.job[j];
}
__device__ inline const Matrix& matrix_of(const Gemv& p, const Job& job, int tile) {
  int m = job.first_matrix;
  for (int left = job.matrices - 1; left > 0 && tile >= p.matrix[m + 1].first_tile; --left) ++m;
  return p.matrix[m];
}
// Unit `block` of a row tile, counted from the matrix's first column: the Source's unit (ring.cuh).
template <Kind kind>
__device__ inline auto unit_at(const Gemv& p, const Job& job, int tile, int block, int lane) {
  const Matrix& m = matrix_of(p, job, tile);
  if constexpr (is_packed(kind)) {
    return m.data + int64_t((tile - m.first_tile) * p.stretches() + block) * unit_bytes(kind);
  } else {
    return Unit<kind>(m.data, m.rows, p.columns, tile - m.first_tile, block, lane);
  }
}
// The global scale that this thread brings to Head: of the job's matrix of its number.
template <Kind kind>
__device__ inline float global_scale_of(const Gemv& p, const Job& job) {
  if (kind != Kind::nvfp4 || threadIdx.x >= job.matrices) return 1.0f;
  return *static_cast<const float*>(p.matrix[job.first_matrix + threadIdx.x].scales);
}
// The scale of the FP8 unit of 128 columns with this number, counted from the matrix's first column.
__device__ inline float block_scale_of(const Gemv& p, const Matrix& m, int tile, int unit) {
  constexpr int kColumns = unit_columns(Kind::fp8);
  const int blocks = int(ceil_div(p.columns, kColumns));
  const int row = (tile - m.first_tile) / (kColumns / kUnitRows);
  return read_block_scale(m.scales, m.e8m0, row * blocks + min(unit, blocks - 1));
}

inline int64_t tile_bytes(Kind kind, int columns) {
  const int64_t units = ceil_div(columns, unit_columns(kind));
  return units * (is_packed(kind) ? unit_bytes(kind) : kPieces * kPieceBytes);
}

// Divides `clusters` among the jobs so that the one that ends last ends early; the bytes that its clusters then read.
inline int64_t divide(Gemv& p, int clusters) {
  auto bytes_of = [&](const Job& job) { return job.most_tiles() * tile_bytes(job.kind, p.columns); };
  for (int j = 0; j < p.jobs; ++j) p.job[j].clusters = 1;
  auto slowest = [&] {
    int found = 0;
    for (int j = 1; j < p.jobs; ++j) found = bytes_of(p.job[j]) > bytes_of(p.job[found]) ? j : found;
    return found;
  };
  for (int left = clusters - p.jobs; left > 0; --left) {
    Job& job = p.job[slowest()];
    if (job.clusters == job.tiles) break;
    ++job.clusters;
  }
  for (int j = 0, first = 0; j < p.jobs; first += p.job[j++].clusters) p.job[j].first_cluster = first;
  for (int j = 0; j < p.jobs; ++j) {
    Job& job = p.job[j];
    job.each = job.tiles / job.clusters;
    job.more = job.tiles % job.clusters;
  }
  return bytes_of(p.job[slowest()]);
}

// What is asked of the device once for all sizes of a kernel's clusters.
struct Clusters {
  int count[kMaxSplitBits + 1];
  cudaError_t error;

  explicit Clusters(void (*kernel)(Gemv)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
    if (error == cudaSuccess) error = count_clusters(kernel, kThreads, kMaxShared, count);
  }
};

// Starts a kernel that has been prepared, once: `two_blocks` of it, of two launches, may share a multiprocessor.
template <void (*kernel)(Gemv), bool two_blocks>
cudaError_t start_kernel(const Gemv& p, int shared, cudaStream_t stream) {
  static const cudaError_t ready = [] {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
    if (error != cudaSuccess || !two_blocks) return error;
    // They need all of what could be L1 cache.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  }();
  if (ready != cudaSuccess) return ready;
  const Job& last = p.job[p.jobs - 1];
  Grid grid{.blocks = int64_t(last.first_cluster + last.clusters) * p.splits(), .threads = kThreads};
  grid.shared = size_t(shared);
  grid.cluster = p.splits();
  grid.overlap = p.overlap;
  return launch(kernel, grid, stream, p);
}

// `first` .. + `count` - 1 of the tokens as a call of its own.
inline Gemv part_of(const Gemv& p, int first, int count) {
  Gemv part = p;
  part.tokens = count;
  part.x += first * p.x_stride;
  if (p.token_scale != nullptr) part.token_scale += first;
  for (int i = 0; i < p.matrices; ++i) {
    Matrix& m = part.matrix[i];
    m.out = static_cast<char*>(m.out) + first * m.stride * (m.out_f32 ? sizeof(float) : sizeof(bf16));
  }
  return part;
}

// 9 to 32 tokens (gemv_mma_many.cu).
cudaError_t start_many(const Gemv& p, cudaStream_t stream);

}  // namespace gemv
}  // namespace dsv4
