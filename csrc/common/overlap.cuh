// Programmatic dependent launch: a kernel may start while the one before it in the stream still runs.
#pragma once

#include <cuda_runtime.h>

namespace dsv4 {

// Once every block of this launch has called this or ended, blocks of the next launch may start, if its Grid says so
// (common/launch.cuh).
__device__ inline void let_next_launch_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Until the launch before has ended and all it wrote can be read. Before this only what no recent launch writes may be
// read, and nothing may be written.
__device__ inline void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Brings the 32 bytes around an address into L2, which may happen before the wait: L2 is where all writes meet.
__device__ inline void fetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// The same of `bytes` at `at`, both multiples of 16.
__device__ inline void fetch_to_l2(const void* at, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes));
}

}  // namespace dsv4
