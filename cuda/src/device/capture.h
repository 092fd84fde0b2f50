// Ring² from the device's side: what the launches that open a step (step.h), capture a group and close the step do. A block's threads run
// function together; `Block` gives thread(), threads(), index(), count(), sync(), also of some warps, load(): a copy, sum(): exclusive
// prefix sums of up to kGroupTensors numbers, the total in the place behind them or returned, and of a thread's warp lane(), lanes(),
// warp(), warps() and across(): what merging a value of all its lanes gives. No block waits for one that may not have started.
//
// What is done is decided when it runs, by what the step's open launch wrote: a graph that was recorded long ago follows a change of gates
// at its next replay. Steps whose rows are all FULL or OFF, site by site, go the short way (group.h); the others (kLevelled) that of
// parts.h; those with conditions that of keep.h.
#pragma once

#include "group.h"
#include "keep.h"
#include "step.h"

namespace dmi::device {

// The longer ways apart, so that the short one does not have their registers.
template <typename Block>
DMI_HD DMI_APART void capture_levelled(Block& block, State& s, const Group& g, Scratch& x) {
  capture_group<true>(block, s, g, x);
}

template <typename Block>
DMI_HD DMI_APART void capture_watched(Block& block, State& s, const Group& g, Scratch& x) {
  const bool decides = watch_group(block, s, g, x);
  if (decides ? divide(block, s, g, x) : divided(block, g)) return capture_lots(block, s, g, x);
  if (block.thread() == 0) x.first = decides;
  capture_levelled(block, s, g, x);
}

template <typename Block>
DMI_HD DMI_APART void capture_apart(Block& block, State& s, const Group& g, Scratch& x) {
  if (x.fixed.watched != 0) return capture_watched(block, s, g, x);
  capture_levelled(block, s, g, x);
}

template <typename Block>
DMI_HD void capture(Block& block, const Group& g, Scratch& x) {
  State& s = *g.state;
  // Who comes first reserves. Asked for ahead of all else, since the answer takes as long as what follows.
  uint32_t came = 0;
  if (block.thread() == 0 && block.count() != 1) came = wrap_relaxed_gpu(g.meeting->arrived, block.count() - 1);
  block.load(x.tensor, g.tensor, g.count);
  block.load(&x.fixed, &s.fixed, 1);
  if (block.thread() == 0) x.first = came == 0;
  block.sync();
  const Fixed& f = x.fixed;
  if (f.open == 0) {
    if (block.index() == 0 && block.thread() == 0) count(s.counters.outside, g.count);
    return;
  }
  if (f.gated != 0 || f.lost != 0) return;  // its OPEN or GAP has booked every row
  if ((f.watched | f.levelled) != 0) return capture_apart(block, s, g, x);
  capture_group<false>(block, s, g, x);
}

}  // namespace dmi::device
