// The shared mapping: a sealed memfd laid out as abi/ring.h says, and the two doorbells.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dmi/dmi.h"

namespace dmi {

class Mapping {
 public:
  // Validates and rounds the options; throws Error.
  explicit Mapping(const dmi_ring_options& options);
  // What one of these options takes.
  static uint64_t bytes(const dmi_ring_options& options);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const dmi_header& header() const { return header_; }
  void* base() const { return base_; }
  dmi_control& control() const { return *at<dmi_control>(header_.control_offset); }
  dmi_site* sites() const { return at<dmi_site>(header_.sites_offset); }
  dmi_gate* gates() const { return at<dmi_gate>(header_.gates_offset); }
  dmi_clause* clauses() const { return reinterpret_cast<dmi_clause*>(gates() + header_.site_capacity); }
  dmi_watch* watches() const { return reinterpret_cast<dmi_watch*>(clauses() + DMI_MAX_CLAUSES); }
  dmi_keep* keeps() const { return reinterpret_cast<dmi_keep*>(watches() + DMI_MAX_WATCHES); }
  uint64_t* probe_words() const { return reinterpret_cast<uint64_t*>(keeps() + header_.site_capacity); }  // two weights each
  dmi_record* records(uint32_t lane) const { return at<dmi_record>(header_.records_offset) + size_t{lane} * header_.record_capacity; }
  std::byte* table(uint32_t lane) const { return at<std::byte>(header_.tables_offset) + lane * header_.table_bytes; }
  dmi_command* commands() const { return at<dmi_command>(header_.commands_offset); }
  std::byte* staging() const { return at<std::byte>(header_.staging_offset); }
  std::byte* spill() const { return at<std::byte>(header_.spill_offset); }

  int memfd() const { return memfd_; }
  int engine_bell() const { return engine_bell_; }
  int pump_bell() const { return pump_bell_; }

  // In a forked child: the descriptors are the parent's business. Async-signal-safe.
  void drop_descriptors();

 private:
  template <typename T>
  T* at(uint64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  dmi_header header_{};  // our own copy: what we compute with cannot be changed from outside
  std::byte* base_ = nullptr;
  int memfd_ = -1, engine_bell_ = -1, pump_bell_ = -1;
};

// Wakes whoever polls the eventfd.
void ring_bell(int eventfd);

}  // namespace dmi
