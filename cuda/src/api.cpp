// dmi.h: handles, statuses and messages, and which step the calling thread has open.
#include <algorithm>
#include <string>
#include <vector>

#include "copy.h"
#include "dmi/dmi.h"
#include "error.h"
#include "registry.h"

namespace dmi {
namespace {

thread_local std::string last_error;

template <typename Body>
auto guarded(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error& error) {
    last_error = error.what();
    return error.status;
  } catch (const std::exception& error) {
    last_error = error.what();
    return DMI_ERROR_SYSTEM;
  }
}

template <typename Body>
auto with_ring(const char* what, int64_t handle, Body body) -> decltype(body(std::declval<Ring&>())) {
  return guarded([&]() -> decltype(body(std::declval<Ring&>())) {
    Use ring(handle);
    if (!ring)
      throw Error(DMI_ERROR_CLOSED, std::string(what) + ": the ring is closed, or was made before this process was forked; make a new one");
    return body(*ring);
  });
}

// What the calling thread does on a ring.
struct Place {
  int64_t ring;
  Lane* lane;          // its step is open; nullptr between steps
  uint32_t preferred;  // lane of its last step: its lines are in this core's cache, and order is kept
};

struct Places {
  std::vector<Place> all;

  Place* find(int64_t ring) {
    for (Place& place : all) {
      if (place.ring == ring) return &place;
    }
    return nullptr;
  }

  Place& of(int64_t ring) {
    if (Place* place = find(ring)) return *place;
    // Rings come and go over a thread's life: forget those that are closed.
    std::erase_if(all, [](const Place& place) { return !Use(place.ring); });
    return all.emplace_back(Place{ring, nullptr, 0});
  }

  // A thread that ends with a step open leaves it as an exception would have.
  ~Places() {
    for (Place& place : all) {
      if (place.lane == nullptr) continue;
      if (Use ring(place.ring); ring) ring->close_step(*place.lane, true, kSameStream);
    }
  }
};

thread_local Places places;

void abort_open_step(Ring& ring, Place& place) {
  if (place.lane == nullptr) return;
  ring.close_step(*place.lane, true, kSameStream);
  place.lane = nullptr;
}

int32_t open_step(int64_t ring, const Opening& opening) {
  return with_ring("open step", ring, [&](Ring& r) -> int32_t {
    Place& place = places.of(ring);
    abort_open_step(r, place);
    place.lane = r.open_step(opening, place.preferred);
    if (place.lane == nullptr) return 0;
    place.preferred = place.lane->index();
    return place.lane->step.gated ? 0 : 1;
  });
}

}  // namespace
}  // namespace dmi

using dmi::Place;
using dmi::Ring;

extern "C" {

const char* dmi_last_error(void) { return dmi::last_error.c_str(); }

int64_t dmi_ring_create(const dmi_ring_options* options) {
  return dmi::guarded([&]() -> int64_t { return dmi::create_ring(*options); });
}

int64_t dmi_ring_shared_bytes(const dmi_ring_options* options) {
  return dmi::guarded([&] { return int64_t(dmi::Mapping::bytes(*options)); });
}

int32_t dmi_has_cuda(void) { return dmi::has_devices() ? 1 : 0; }

void* dmi_ring_token(int64_t ring) {
  dmi::Use use(ring);
  return use && use->device() != nullptr ? use->device()->token() : nullptr;
}

int64_t dmi_ring_of_token(const void* token) { return dmi::ring_of_token(token); }

int64_t dmi_ring_device_bytes(int64_t ring) {
  return dmi::with_ring("ask for the ring's memory", ring,
                        [&](Ring& r) -> int64_t { return r.device() == nullptr ? 0 : int64_t(r.device()->bytes()); });
}

int32_t dmi_ring_fds(int64_t ring, int32_t fds[3]) {
  return dmi::with_ring("ask for the ring's descriptors", ring, [&](Ring& r) -> int32_t {
    fds[0] = r.mapping().memfd();
    fds[1] = r.mapping().engine_bell();
    fds[2] = r.mapping().pump_bell();
    return DMI_OK;
  });
}

int32_t dmi_ring_producer(int64_t ring, uint8_t producer[16]) {
  return dmi::with_ring("ask for the ring's name", ring, [&](Ring& r) -> int32_t {
    std::copy_n(r.mapping().header().producer, 16, producer);
    return DMI_OK;
  });
}

int64_t dmi_ring_add_site(int64_t ring, const dmi_site* site) {
  return dmi::with_ring("add site", ring, [&](Ring& r) -> int64_t { return r.add_site(*site); });
}

int32_t dmi_ring_set_attached(int64_t ring, int32_t attached) {
  return dmi::with_ring("say whether an engine is there", ring, [&](Ring& r) -> int32_t {
    r.set_attached(attached != 0);
    return DMI_OK;
  });
}

int32_t dmi_ring_set_groups(int64_t ring, uint64_t groups, const uint64_t* requests, const uint64_t* members, uint32_t count) {
  return dmi::with_ring("say who requests are", ring, [&](Ring& r) -> int32_t {
    if (members == nullptr) {
      r.groups().forget(requests, count);
    } else {
      r.groups().tell(groups, requests, members, count);
    }
    return DMI_OK;
  });
}

int32_t dmi_ring_counters(int64_t ring, dmi_counters* counters, uint32_t lanes, dmi_gauges* gauges) {
  return dmi::with_ring("read the ring's counters", ring,
                        [&](Ring& r) -> int32_t { return int32_t(r.counters(counters, lanes, *gauges)); });
}

int32_t dmi_ring_closed_steps(int64_t ring, uint64_t* steps, uint32_t lanes) {
  return dmi::with_ring("ask for the steps closed", ring, [&](Ring& r) -> int32_t { return int32_t(r.closed_steps(steps, lanes)); });
}

int32_t dmi_ring_settle(int64_t ring, uint64_t bound_ns) {
  return dmi::with_ring("wait for the steps that were closed", ring, [&](Ring& r) -> int32_t {
    r.settle(bound_ns);
    return DMI_OK;
  });
}

int32_t dmi_ring_finish(int64_t ring, uint64_t bound_ns) {
  return dmi::with_ring("finish the ring", ring, [&](Ring& r) -> int32_t {
    dmi::abort_open_step(r, dmi::places.of(ring));
    if (!r.finish(bound_ns)) {
      throw dmi::Error(DMI_ERROR_TIMEOUT, "finish the ring: the engine made no room for the record of steps that were dropped whole");
    }
    return DMI_OK;
  });
}

int32_t dmi_ring_close(int64_t ring) {
  return dmi::guarded([&]() -> int32_t {
    if (dmi::Use use(ring); use) {
      dmi::abort_open_step(*use, dmi::places.of(ring));
      use->finish(0);
    }
    dmi::close_ring(ring);
    return DMI_OK;
  });
}

int32_t dmi_step_open(int64_t ring, uint64_t step, const dmi_span* spans, uint32_t count, const uint32_t width[DMI_SPACES], uint32_t keys,
                      uint32_t table_flags, void* stream) {
  return dmi::open_step(ring, {step, spans, count, width, keys, table_flags, stream});
}

int32_t dmi_step_next(const dmi_series* s, uint64_t step, uint32_t keys, void* stream) {
  for (uint32_t i = 0; i < s->count; ++i) {
    ++s->spans[i].position;
    s->spans[i].phase = DMI_PHASE_DECODE;
  }
  return dmi::open_step(s->ring, {step, s->spans, s->count, s->width, keys, s->table_flags, stream});
}

int32_t dmi_pack_rows(const dmi_pack* pack, uint32_t count) { return dmi::pack_rows(*pack, count); }

int32_t dmi_step_close(int64_t ring, uint64_t step, int32_t aborted, void* stream) {
  return dmi::with_ring("close step", ring, [&](Ring& r) -> int32_t {
    Place* place = dmi::places.find(ring);
    if (place == nullptr || place->lane == nullptr || place->lane->step.number != step) return DMI_OK;
    dmi::Lane& lane = *place->lane;
    place->lane = nullptr;
    r.close_step(lane, aborted != 0, stream);
    return DMI_OK;
  });
}

void dmi_share_copies(dmi_share share) { dmi::share_copies(share); }

void dmi_capture(int64_t ring, const dmi_tensor* tensors, uint32_t count, int32_t beside, void* stream) {
  dmi::Use use(ring);
  if (!use || use->record(tensors, count, beside != 0, stream) || count == 0) return;
  Place* place = dmi::places.find(ring);
  if (place == nullptr || place->lane == nullptr) return use->count_outside(count);
  use->capture(*place->lane, tensors, count, stream);
}

int32_t dmi_ring_branch(int64_t ring, int32_t may, void* stream) {
  return dmi::with_ring("let a recording branch", ring, [&](Ring& r) -> int32_t {
    r.branch(may != 0, stream);
    return DMI_OK;
  });
}

}  // extern "C"
