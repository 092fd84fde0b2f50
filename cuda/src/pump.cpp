#include "pump.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "copy.h"
#include "ring.h"
#include "shared.h"

namespace dmi {
namespace {

// Between two looks at a device that is at work. What it adds to the time until the engine knows, and as much again or more for the sleep
// to end.
constexpr uint64_t kLookNs = 10'000;
// How long it is looked at without a sleep after something came of a look: a step's records come close together, and so do the engine's
// command for them and the end of a small copy.
constexpr uint64_t kSpinNs = 50'000;
// How long a device is looked at after it said that it is idle: that word may overtake the last record; and mostly another step follows.
constexpr uint64_t kLingerNs = 2'000'000;

// A moment in which the core does as good as nothing.
void pause() {
#if defined(__x86_64__)
  for (int i = 0; i < 16; ++i) __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pump::Pump(const Mapping& mapping, std::byte* payload, Device* device, const std::atomic<bool>& attached)
    : mapping_(mapping), payload_(payload), device_(device), attached_(attached) {
  // Signals are the host program's: its handlers must not run here.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "dmi-pump");
}

void Pump::look() {
  full_fence();  // pairs with run()'s: either it sees that the device is busy, or we see that it waits
  if (load_relaxed(mapping_.control().pump_waiting.value) != 0) ring_bell(mapping_.pump_bell());
}

void Pump::stop() {
  if (!thread_.joinable()) return;
  stop_.store(true, std::memory_order_seq_cst);
  ring_bell(mapping_.pump_bell());
  thread_.join();
}

void Pump::run() {
  prctl(PR_SET_TIMERSLACK, 1'000, 0, 0, 0);  // ns; the system's 50 us would be added to every sleep
  uint64_t& waiting = mapping_.control().pump_waiting.value;
  for (;;) {
    if (drain()) {
      if (device_ != nullptr) spin_until_ = monotonic_ns() + kSpinNs;
      continue;
    }
    if (spin_until_ != 0) {
      if (monotonic_ns() < spin_until_ && !stop_.load(std::memory_order_relaxed)) {
        pause();
        continue;
      }
      spin_until_ = 0;
    }
    // "I wait", then one more look; the engine publishes commands_head, then looks whether we wait. One sees the other.
    store_seq_cst(waiting, 1);
    full_fence();
    const bool stopping = stop_.load(std::memory_order_seq_cst);
    if (drain()) {
      store_seq_cst(waiting, 0);
      continue;
    }
    if (device_ != nullptr && !device_->failed()) {
      const bool copying = done_ != begun_;
      if (device_->busy()) busy_until_ = monotonic_ns() + kLingerNs;
      if (copying || (!stopping && monotonic_ns() < busy_until_)) {
        store_seq_cst(waiting, 0);
        sleep_ns(kLookNs);
        continue;
      }
    }
    if (stopping) return;
    pollfd bell{mapping_.pump_bell(), POLLIN, 0};
    poll(&bell, 1, -1);
    uint64_t rings;
    [[maybe_unused]] ssize_t got = read(mapping_.pump_bell(), &rings, sizeof rings);
    store_seq_cst(waiting, 0);
  }
}

// Everything there is to do now. False where nothing was.
bool Pump::drain() {
  dmi_control& control = mapping_.control();
  // Pairs with the engine's release, after it has written the commands below.
  const uint64_t head = load_acquire(control.commands_head.value);
  const uint64_t capacity = mapping_.header().command_capacity;
  bool any = false;
  if (head < begun_ || head - done_ > capacity) {
    if (refused_.fetch_add(1, std::memory_order_relaxed) == 0) {
      std::fprintf(stderr, "dmi: the engine's command ring says %llu after %llu, with %llu slots; nothing more is copied for it\n",
                   static_cast<unsigned long long>(head), static_cast<unsigned long long>(begun_),
                   static_cast<unsigned long long>(capacity));
    }
  } else {
    for (; begun_ != head; any = true) {
      const dmi_command command = mapping_.commands()[begun_ & (capacity - 1)];
      if (!copy(command, begun_) && refused_.fetch_add(1, std::memory_order_relaxed) == 0) {
        std::fprintf(stderr, "dmi: refused the engine's copy command %llu: it leaves the payload or staging region\n",
                     static_cast<unsigned long long>(begun_));
      }
      ++begun_;
      if (device_ == nullptr) done_through(begun_);
    }
  }
  if (device_ == nullptr) return any;
  const bool settled = settle();
  const bool seen = watch();
  return any || settled || seen;
}

void Pump::done_through(uint64_t commands) {
  done_ = commands;
  // Pairs with the engine's acquire of commands_done: the bytes are in staging.
  store_release(mapping_.control().commands_done.value, commands);
  wake_engine();
}

void Pump::wake_engine() {
  full_fence();  // pairs with the engine's, between its engine_waiting and its last look
  if (load_relaxed(mapping_.control().engine_waiting.value) != 0 && attached_.load(std::memory_order_relaxed))
    ring_bell(mapping_.engine_bell());
}

// Tells the engine which of the device's copies are complete.
bool Pump::settle() {
  if (done_ == begun_) return false;
  const uint64_t complete = device_->copies_complete();
  if (complete == done_) return false;
  done_through(complete);
  return true;
}

// Wakes the engine for records that the device has published. Lane 0 is the device's.
bool Pump::watch() {
  const uint64_t before = records_;
  const uint64_t mask = mapping_.header().record_capacity - 1;
  // Pairs with the device's release: what it counts is only that there is something, the engine looks for itself.
  for (uint64_t seq; (seq = load_acquire(mapping_.records(0)[records_ & mask].seq)) > records_;) records_ = seq;
  if (records_ == before) return false;
  wake_engine();
  return true;
}

bool Pump::copy(const dmi_command& c, uint64_t index) {
  const dmi_header& h = mapping_.header();
  const bool good = c.id == index && c.bytes <= h.payload_bytes && c.staging <= h.staging_bytes && c.bytes <= h.staging_bytes - c.staging;
  std::byte* to = mapping_.staging() + c.staging;
  if (device_ != nullptr) return device_->begin_copy(to, c.payload, good ? c.bytes : 0) && good;
  if (!good) return false;
  in_ring(payload_, h.payload_bytes, c.payload, c.bytes,
          [to](const std::byte* from, uint64_t first, uint64_t bytes) { std::memcpy(to + first, from, bytes); });
  return true;
}

}  // namespace dmi
