// select_topk: ops/indexer/reference.py, the k best visible scores of a row: exact, ties by lowest index, no sort. How
// is told in select.cuh; most rows of a step are chosen by select_step.cu.
//
// Launches overlap (common/overlap.cuh): histograms are cleared while the scores are still computed.
// Bytes: a row's visible scores once from L2. Expected: 8,192 rows of 15,400 entries 0.6 ms.
// sass select_topk_kernel: LDG.E.128, ATOMS
#include "indexer/select.cuh"

namespace dsv4 {
namespace {

// kBlocks: of a cluster, whose first block alone takes a row that is not divided.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks > 1 ? 1 : 2) select_topk_kernel(const Select p) {
  extern __shared__ unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kBlocks>*>(memory);
  let_next_launch_start();
  const int rank = blockIdx.x % kBlocks;
  const int64_t token = blockIdx.x / kBlocks;
  clear(shared);
  if constexpr (kBlocks > 1) {
    if (threadIdx.x == 0) {
      const uint32_t barrier = uint32_t(__cvta_generic_to_shared(shared.arrived));
      for (int i = 0; i <= kDigits; ++i) make_barrier(barrier + 8 * i, 1);
      publish_barriers();
      for (int i = 0; i < kDigits; ++i) expect_bytes(barrier + 8 * i, sizeof(shared.counts[0]));
      expect_bytes(barrier + 8 * kDigits, sizeof(shared.totals));
    }
    cluster_arrive();
    wait_for_launch_before();
    cluster_wait();
  } else {
    wait_for_launch_before();
    __syncthreads();
  }

  const int64_t sees = p.visible[token];
  const int seen = int(sees < 0 ? 0 : sees < p.entries ? sees : p.entries);
  int32_t* const out = p.out + token * p.width;
  if (seen <= p.top_k) {
    if (rank > 0) return;
    for (int i = threadIdx.x; i < p.width; i += kThreads) out[i] = i < seen ? i : -1;
    return;
  }
  const bool divided = kBlocks > 1 && seen > kAlone;
  if (!divided && rank > 0) return;
  choose_by_digits(p, shared, token, seen, rank, divided);
}

template <int kBlocks>
cudaError_t start(const Select& p, int64_t tokens, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(Shared<kBlocks>);
  auto* kernel = select_topk_kernel<kBlocks>;
  static const cudaError_t ready =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
  if (ready != cudaSuccess) return ready;
  const Grid grid = {
      .blocks = tokens * kBlocks, .threads = kThreads, .shared = kBytes, .cluster = kBlocks, .overlap = true};
  return launch(kernel, grid, stream, p);
}

}  // namespace

cudaError_t select_topk(const float* scores, Maybe<const int32_t> best, const int64_t* visible, int32_t* out,
                        int64_t tokens, int64_t entries, int64_t top_k, cudaStream_t stream) {
  if (tokens < 1 || entries < 1 || entries > kMaxEntries || top_k < 1) return cudaErrorInvalidValue;
  if ((uintptr_t(scores) | uintptr_t(best.data)) % 16) return cudaErrorMisalignedAddress;
  Select p = {scores, reinterpret_cast<const uint4*>(best.data), visible, out, entries};
  p.width = p.top_k = int(top_k < entries ? top_k : entries);
  if (fits_step(p, tokens)) return start_select_step(p, tokens, stream);
  return tokens <= kStep && entries > kAlone ? start<kCluster>(p, tokens, stream) : start<1>(p, tokens, stream);
}

}  // namespace dsv4
