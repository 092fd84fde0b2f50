#include "lane.h"

#include <cstring>

#include "shared.h"

namespace dmi {

Lane::Lane(const Mapping& mapping, uint32_t index)
    : shared_(mapping.control().lane[index]),
      records_(mapping.records(index)),
      tables_(mapping.table(index)),
      record_capacity_(mapping.header().record_capacity),
      table_bytes_(mapping.header().table_bytes),
      index_(index) {}

uint64_t Lane::free_records(uint64_t wanted) {
  auto known = [this] {
    const uint64_t used = head_ - tail_seen_ + aside_;
    return used < record_capacity_ ? record_capacity_ - used : 0;
  };
  if (known() < wanted) {
    // Pairs with the engine's release, after it has copied the records below.
    const uint64_t tail = load_acquire(shared_.record_tail.value);
    if (tail > tail_seen_ && tail <= published_) tail_seen_ = tail;  // an engine that goes back is not believed
  }
  return known();
}

dmi_record& Lane::next(bool from_aside) {
  if (from_aside) --aside_;
  dmi_record& record = records_[head_++ & (record_capacity_ - 1)];
  // The slot's old seq stays until publish(): a reader that looks at the slot now still sees another record's number.
  std::memset(reinterpret_cast<std::byte*>(&record) + sizeof record.seq, 0, sizeof record - sizeof record.seq);
  return record;
}

void Lane::publish() {
  for (; published_ < head_; ++published_) {
    // Pairs with the engine's acquire of seq: record and payload are written.
    store_release(records_[published_ & (record_capacity_ - 1)].seq, published_ + 1);
  }
}

std::byte* Lane::reserve_table(uint64_t bytes, uint64_t& offset) {
  if (bytes > table_bytes_) return nullptr;
  offset = table_head_;
  const uint64_t at = offset % table_bytes_;
  if (at + bytes > table_bytes_) offset += table_bytes_ - at;
  if (offset + bytes - table_tail_seen_ > table_bytes_) {
    // Pairs with the engine's release, after it has copied the tables below.
    const uint64_t tail = load_acquire(shared_.table_tail.value);
    if (tail > table_tail_seen_ && tail <= table_head_) table_tail_seen_ = tail;
    if (offset + bytes - table_tail_seen_ > table_bytes_) return nullptr;
  }
  return tables_ + offset % table_bytes_;
}

}  // namespace dmi
