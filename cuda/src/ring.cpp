#include "ring.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"
#include "shared.h"

namespace dmi {
namespace {

// Private memory. The kernel gives it page by page as it is first written: a ring that stays small costs little.
std::byte* map_payload(uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) system_error("create ring: map " + std::to_string(bytes) + " bytes of payload");
  madvise(base, bytes, MADV_HUGEPAGE);  // advice: first touch then costs a fault per 2 MiB
  madvise(base, bytes, MADV_DONTFORK);  // the child has no use for it
  return static_cast<std::byte*>(base);
}

// Longest wait for the device to be done with a ring that is closed.
constexpr uint64_t kQuiesceNs = 10'000'000'000;

void check_site(const dmi_site& s) {
  const std::string name(reinterpret_cast<const char*>(s.name), std::min<uint32_t>(s.name_bytes, DMI_SITE_NAME_BYTES));
  auto refuse = [&](const std::string& why) { invalid("add site \"" + name + "\": " + why); };
  if (s.name_bytes == 0 || s.name_bytes > DMI_SITE_NAME_BYTES) {
    refuse("its name has " + std::to_string(s.name_bytes) + " bytes; give 1 to " + std::to_string(DMI_SITE_NAME_BYTES));
  }
  if (s.space >= DMI_SPACES) refuse("no row space " + std::to_string(s.space));
  if (s.ndim > DMI_MAX_DIMS) refuse(std::to_string(s.ndim) + " dimensions; at most " + std::to_string(DMI_MAX_DIMS));
  if (s.row_axis > 1) refuse("row axis " + std::to_string(s.row_axis) + "; give 0 or 1");
  if (s.fill > 1) refuse("fill " + std::to_string(s.fill) + "; give 0 (zero) or 1 (minus infinity)");
  int rows = 0, keys = 0;
  for (int d = 0; d < s.ndim; ++d) {
    if (s.role[d] < DMI_ROLE_ROW || s.role[d] > DMI_ROLE_KEY) refuse("no role " + std::to_string(s.role[d]));
    rows += s.role[d] == DMI_ROLE_ROW;
    keys += s.role[d] == DMI_ROLE_KEY;
  }
  if (s.ndim != 0 && (rows < 1 || rows > 2)) refuse("needs one or two ROW dimensions, has " + std::to_string(rows));
  if (keys > 1) refuse("has " + std::to_string(keys) + " KEY dimensions; at most one");
}

}  // namespace

uint64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

uint64_t unix_ns() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

void sleep_ns(uint64_t ns) {
  const timespec duration{time_t(ns / 1'000'000'000), long(ns % 1'000'000'000)};
  nanosleep(&duration, nullptr);
}

Ring::Ring(const dmi_ring_options& options)
    : mapping_(options),
      wait_bound_ns_(options.wait_bound_ns),
      device_(options.device < 0 ? nullptr : make_device(mapping_, options.device, options.wait_bound_ns)),
      payload_(device_ != nullptr ? nullptr : map_payload(mapping_.header().payload_bytes)),
      payload_space_(mapping_.header().payload_bytes, mapping_.control().payload_tail.value, true),
      spill_space_(mapping_.header().spill_bytes, mapping_.control().spill_tail.value, false),
      sites_(mapping_.header().site_capacity),
      pump_(mapping_, payload_, device_.get(), attached_) {
  for (uint32_t i = 0; i < mapping_.header().lanes; ++i) lanes_.push_back(std::make_unique<Lane>(mapping_, i));
}

Ring::~Ring() {
  if (device_ != nullptr) device_->quiesce(kQuiesceNs);
  pump_.stop();
  if (payload_ != nullptr) munmap(payload_, mapping_.header().payload_bytes);
}

uint32_t Ring::add_site(const dmi_site& given) {
  check_site(given);
  std::lock_guard lock(sites_mutex_);
  const uint32_t id = site_count_.load(std::memory_order_relaxed);
  const dmi_header& h = mapping_.header();
  if (id == h.site_capacity) invalid("add site: the ring has " + std::to_string(id) + " already, its site_capacity; create it with more");
  if ((uint64_t{id} + 1) * kRecordsPerSite + kHeadroom + 3 > h.record_capacity) {
    invalid("add site: a step of " + std::to_string(id + 1) + " sites would not fit a record_capacity of " +
            std::to_string(h.record_capacity) + "; create the ring with more");
  }
  dmi_site site = given;
  site.id = id;
  site.spare = 0;
  std::memset(site.pad, 0, sizeof site.pad);
  std::memset(site.name + site.name_bytes, 0, DMI_SITE_NAME_BYTES - site.name_bytes);
  sites_[id] = site;
  mapping_.sites()[id] = site;
  // Pairs with the acquire in open_step.
  site_count_.store(id + 1, std::memory_order_release);
  // Pairs with the engine's acquire of sites_count.
  store_release(mapping_.control().sites_count.value, id + 1);
  return id;
}

void Ring::set_attached(bool attached) {
  attached_.store(attached, std::memory_order_relaxed);
  // What was published while nobody was to be woken.
  if (attached) ring_bell(mapping_.engine_bell());
}

void Ring::wake_engine() {
  full_fence();  // pairs with the engine's, between its engine_waiting and its last look
  if (load_relaxed(mapping_.control().engine_waiting.value) != 0 && attached_.load(std::memory_order_relaxed)) {
    ring_bell(mapping_.engine_bell());
  }
}

void Ring::book_wait(Lane& lane, uint64_t ns) {
  if (device_ != nullptr) {  // the counters are the device's to write
    ++host_work_.waits;
    host_work_.wait_ns += ns;
    return;
  }
  add(lane.counters().waits, 1);
  add(lane.counters().wait_ns, ns);
  lane.step.wait_ns += ns;
}

// As of the last step that the device closed.
void Ring::device_used(dmi_gauges& gauges) const {
  dmi_control& control = mapping_.control();
  auto used = [](uint64_t head, uint64_t tail) { return head > tail ? head - tail : 0; };
  gauges.payload_used = used(device_->payload_head(), load_acquire(control.payload_tail.value));
  gauges.spill_used = used(device_->spill_head(), load_acquire(control.spill_tail.value));
}

uint32_t Ring::counters(dmi_counters* counters, uint32_t lanes, dmi_gauges& gauges) {
  const uint32_t count = std::min<uint32_t>(lanes, uint32_t(lanes_.size()));
  static_assert(sizeof(dmi_counters) % sizeof(uint64_t) == 0);
  for (uint32_t i = 0; i < count; ++i) {
    auto* from = reinterpret_cast<uint64_t*>(&lanes_[i]->counters());
    auto* to = reinterpret_cast<uint64_t*>(&counters[i]);
    for (size_t word = 0; word < sizeof(dmi_counters) / sizeof(uint64_t); ++word) to[word] = load_relaxed(from[word]);
  }
  gauges = {};
  if (device_ != nullptr) {
    device_used(gauges);
  } else {
    gauges.payload_used = payload_space_.used();
    gauges.spill_used = spill_space_.used();
  }
  gauges.outside = outside_.load(std::memory_order_relaxed);
  gauges.bad_commands = pump_.refused();
  std::lock_guard lock(gap_mutex_);
  gauges.gap_steps = gap_.steps;
  gauges.gap_rows = gap_.rows;
  return count;
}

uint32_t Ring::closed_steps(uint64_t* steps, uint32_t lanes) const {
  const uint32_t count = std::min<uint32_t>(lanes, uint32_t(lanes_.size()));
  for (uint32_t i = 0; i < count; ++i) steps[i] = lanes_[i]->closed.load(std::memory_order_acquire);
  return count;
}

void Ring::forked_in_child() {
  foreign_.store(true, std::memory_order_relaxed);
  mapping_.drop_descriptors();
}

}  // namespace dmi
