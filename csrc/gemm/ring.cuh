// A warp's weights under way: a ring of units in shared memory that belongs to one warp.
//
// Packed units arrive by one bulk copy each, which a barrier in shared memory counts. Rows of FP8 and bf16 matrices
// arrive by copies of 16 bytes, every lane reading what it copied, so that these need no barrier; their groups are as
// many past the last unit as before it, so that the number to wait for never changes.
#pragma once

#include "gemm/units.cuh"

namespace dsv4 {

// Where the next unit to be copied lies. `exists` false: there are no more.
template <Kind kind>
struct Source {
  Unit<kind> unit;
  bool exists;
};
template <>
struct Source<Kind::nvfp4> {
  const uint8_t* unit;
  bool exists;
};
template <>
struct Source<Kind::mxfp4> {
  const uint8_t* unit;
  bool exists;
};

// `next()` returns the Source of the units to be copied, one after another. kWhole: a packed unit is read before any of
// it is multiplied, so that its slot is free sooner; this takes twelve registers more.
template <Kind kind, int kSlots, bool kWhole = true>
class Ring {
 public:
  // The ring's slots and, of packed kinds, its kSlots barriers.
  __device__ Ring(uint32_t slots, uint32_t barriers, int lane) : slots_(slots), barriers_(barriers), lane_(lane) {
    if (is_packed(kind)) {
      if (lane < kSlots) make_barrier(barriers + 8 * lane, 1);
      publish_barriers();
      __syncwarp();
    }
  }

  // Start the copies of the first units. `paced`: the second and later ones when the first is there.
  template <class Next>
  __device__ void fill(const Next& next, bool paced = false) {
#pragma unroll 1
    for (int s = 0; s < kSlots; ++s) {
      if (!fill_slot(s, next, paced)) return;
    }
  }
  // That of the slots one by one: of FP8 and bf16 all of them before the first unit is taken. False: there is no unit.
  template <class Next>
  __device__ bool fill_slot(int s, const Next& next, bool paced) {
    if constexpr (is_packed(kind)) {
      const Source<kind> from = next();
      if (!from.exists) return false;
      if (paced && s == 1) wait_barrier(barriers_, 0);
      start(s, from);
    } else {
      if (paced && s == 1) wait_copies<0>();
      source_ = next();
#pragma unroll
      for (int q = 0; q < kPieces; ++q) copy_piece(s, q);
    }
    return true;
  }

  // The unit at the ring's end, half by half: `multiply(half, operands)`, while the next one takes its place.
  template <class Next, class Multiply>
  __device__ void take(const Next& next, const Multiply& multiply) {
    constexpr int kTogether = part_pieces(kind), kHalves = part_halves(kind), kParts = kPieces / kTogether;
    constexpr bool kPacked = is_packed(kind);
    const uint32_t at = slots_ + slot_ * kUnitShared;
    uint4 pieces[kParts][kTogether];
    [[maybe_unused]] uint2 scales;
    auto read_part = [&](int part) {
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        pieces[part][q] = read_shared_16(at + (part * kTogether + q) * kPieceBytes + 16 * lane_);
      }
    };
    [[maybe_unused]] auto copy_next = [&] {
      if constexpr (kPacked) {
        fence_copies();  // reads under way could be overtaken
        __syncwarp();    // every lane has read all of the unit
        start(slot_, next());
      }
    };
    if constexpr (kPacked) {
      wait_barrier(barriers_ + 8 * slot_, parity_);
      scales = read_scales<kind>(at, lane_);
      if constexpr (kWhole) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) read_part(part);
        copy_next();
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if constexpr (!kPacked) wait_copies<kPieces * kSlots - kTogether>();
      if constexpr (!kPacked || !kWhole) read_part(part);
      ScalePair of_part = {};
      if constexpr (kPacked) {
        of_part = unpack_scales<kind>(scales, part);
        if constexpr (!kWhole) {
          if (part == kParts - 1) copy_next();
        }
      } else {
        if (part == 0) source_ = next();
#pragma unroll
        for (int q = 0; q < kTogether; ++q) copy_piece(slot_, part * kTogether + q);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        uint32_t a[kSteps][4];
        unpack_half<kind>(pieces[part], of_part, h, a);
        multiply(part * kHalves + h, a);
      }
    }
    if (++slot_ == kSlots) slot_ = 0, parity_ ^= 1;
  }

 private:
  __device__ void start(int slot, const Source<kind>& from) {
    if (!from.exists || lane_ != 0) return;
    expect_bytes(barriers_ + 8 * slot, unit_bytes(kind));
    copy_bulk(slots_ + slot * kUnitShared, from.unit, unit_bytes(kind), barriers_ + 8 * slot);
  }
  __device__ void copy_piece(int slot, int q) {
    if (source_.exists) source_.unit.copy(slots_ + slot * kUnitShared, q, lane_);
    commit_copies();
  }

  uint32_t slots_, barriers_;
  int lane_, slot_ = 0, parity_ = 0;
  Source<kind> source_;  // FP8, bf16: of which pieces are being copied
};

}  // namespace dsv4
