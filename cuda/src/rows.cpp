#include "rows.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace dmi {
namespace {

void append(std::vector<Run>& runs, Run run) {
  if (!runs.empty()) {
    Run& last = runs.back();
    if (last.batch == run.batch && last.first + last.count == run.first) {
      last.count += run.count;
      return;
    }
  }
  runs.push_back(run);
}

// Rows first, first + 1, ... of a span.
void append(RowList& list, const dmi_span& span, uint32_t first, uint32_t count) {
  const uint64_t index = uint64_t{span.first} + first, flat = span.batch * list.width + index;
  append(list.runs, {span.batch, index, count});
  append(list.flat, {0, flat, count});
  list.owns.push_back({span.request, span.key_first, uint64_t{span.position} + first, count});
  list.rows += count;
  list.batches = std::max<uint64_t>(list.batches, uint64_t{span.batch} + 1);
  list.end = std::max<uint64_t>(list.end, index + count);
  list.flat_end = std::max<uint64_t>(list.flat_end, flat + count);
}

void clear(RowList& list, uint64_t width) {
  list.rows = list.batches = list.end = list.flat_end = 0;
  list.runs.clear();
  list.flat.clear();
  list.owns.clear();
  list.width = width;
}

bool same_rows(const RowLists& lists, const RowSource& source, const dmi_span* spans, uint32_t count, const uint32_t width[DMI_SPACES],
               bool packed) {
  if (count == 0 || count != source.spans.size() || packed != source.packed) return false;
  for (uint32_t space = 0; space < DMI_SPACES; ++space) {
    if (lists[space].width != (packed ? 0 : width[space])) return false;
  }
  uint64_t differ = 0;  // in what row lists say, positions aside
  for (uint32_t i = 0; i < count; ++i) {
    const dmi_span &a = source.spans[i], &b = spans[i];
    differ |= (a.request ^ b.request) | (a.space ^ b.space) | (a.batch ^ b.batch) | (a.first ^ b.first) | (a.count ^ b.count) |
              (a.key_first ^ b.key_first) | uint64_t(a.flags ^ b.flags);
  }
  return differ == 0;
}

void move_on(RowLists& lists, const dmi_span* spans, uint32_t count) {
  std::array<size_t, DMI_SPACES> next{};
  for (uint32_t i = 0; i < count; ++i) {
    const dmi_span& span = spans[i];
    if (span.count == 0 || (span.flags & DMI_SPAN_NO_ROWS) != 0) continue;
    lists[span.space].owns[next[span.space]++].position = span.position;
  }
}

// Row `row` to runs of a level, which it may go on.
void append(std::vector<dmi_run>& runs, uint32_t row, dmi_run fresh) {
  if (!runs.empty()) {
    dmi_run& last = runs.back();
    const uint32_t gap = row - (last.first + (last.count - 1) * last.stride);
    if (last.count == 1 || gap == last.stride) {
      last.stride = gap;
      ++last.count;
      return;
    }
  }
  fresh.first = row;
  fresh.count = fresh.stride = 1;
  runs.push_back(fresh);
}

}  // namespace

Selection::Selection(const dmi_gate& gate, std::vector<dmi_clause> clauses)
    : gate_(gate),
      clauses_(std::move(clauses)),
      grouped_(std::any_of(clauses_.begin(), clauses_.end(), [](const dmi_clause& c) { return c.group != 0; })) {}

bool Selection::same(const dmi_gate& gate) const {
  return gate.level == gate_.level && gate.stride == gate_.stride && gate.clause == gate_.clause && gate.clauses == gate_.clauses;
}

void Selection::apply(const RowLists& lists, const dmi_span* spans, uint32_t count, const std::vector<Membership>& members, uint16_t number,
                      std::vector<dmi_run>& runs) {
  for (uint32_t space = 0; space < DMI_SPACES; ++space) {
    for (RowLists& level : lists_) clear(level[space], lists[space].width);
    for (std::vector<dmi_run>& level : runs_) level.clear();
    uint32_t row = 0;
    for (uint32_t i = 0; i < count; ++i) {
      const dmi_span& span = spans[i];
      if (span.space != space || (span.flags & DMI_SPAN_NO_ROWS) != 0) continue;
      const Membership member = grouped_ ? members[i] : Membership{};
      asking_.clear();  // requests and phases are the same for all of a span's rows, which may be thousands
      for (const dmi_clause& c : clauses_) {
        if (clause_asks(c, span, member)) asking_.push_back(&c);
      }
      for (uint32_t n = 0; n < span.count;) {
        const uint8_t level = row_level(gate_, asking_, span, span.position + n);
        uint32_t same = 1;
        while (n + same < span.count && row_level(gate_, asking_, span, span.position + n + same) == level) ++same;
        append(lists_[level][space], span, n, same);
        for (const uint32_t end = row + same; row < end; ++row) {
          append(runs_[level], row, {0, 0, 0, number, uint8_t(space), level});
        }
        n += same;
      }
    }
    for (const std::vector<dmi_run>& level : runs_) runs.insert(runs.end(), level.begin(), level.end());
  }
}

uint32_t Selection::records(uint32_t space) const {
  uint32_t needed = 0;
  for (uint32_t level = 0; level < DMI_LEVELS; ++level) {
    if (lists_[level][space].rows != 0) needed += records_of(level);
  }
  return needed;
}

bool pack_rows(const dmi_pack& pack, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    if (pack.sequences[pack.slots[i]].next != pack.positions[i]) return false;
  }
  uint32_t row = 0;
  for (uint32_t i = 0; i < count; ++i) {
    dmi_sequence& s = pack.sequences[pack.slots[i]];
    const uint32_t tokens = pack.counts[i];
    const bool decoded = tokens == 1 && s.next >= s.prompt;
    dmi_span& span = pack.spans[i] = {};
    span.request = s.request;
    span.space = DMI_SPACE_TOKENS;
    span.first = row;
    span.count = tokens;
    span.position = s.next;
    span.attempt = s.attempt;
    span.phase = decoded ? DMI_PHASE_DECODE : DMI_PHASE_PREFILL;
    span.flags = s.flags;
    span.prompt = s.prompt;
    row += tokens;
    s.next += tokens;
    dmi_span& last = pack.spans[count + i] = span;
    last.space = DMI_SPACE_LOGITS;
    last.first = i;
    last.count = 1;
    last.position = s.next - 1;
  }
  return true;
}

uint64_t token_rows(const dmi_span* spans, uint32_t count) {
  uint64_t rows = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (spans[i].space == DMI_SPACE_TOKENS && (spans[i].flags & DMI_SPAN_NO_ROWS) == 0) rows += spans[i].count;
  }
  return rows;
}

void build_row_lists(RowLists& lists, RowSource& source, const dmi_span* spans, uint32_t count, const uint32_t width[DMI_SPACES],
                     bool packed) {
  if (same_rows(lists, source, spans, count, width, packed)) return move_on(lists, spans, count);
  source.spans.clear();  // until the lists are made
  for (uint32_t space = 0; space < DMI_SPACES; ++space) {
    clear(lists[space], packed ? 0 : width[space]);
  }
  for (uint32_t i = 0; i < count; ++i) {
    const dmi_span& span = spans[i];
    auto refuse = [&](const std::string& why) { invalid("open step: span " + std::to_string(i) + ": " + why); };
    if (span.space >= DMI_SPACES) refuse("no row space " + std::to_string(span.space));
    if (packed && span.batch != 0) refuse("batch " + std::to_string(span.batch) + " in a packed step");
    if ((span.flags & DMI_SPAN_NO_ROWS) != 0) {
      if (span.space != DMI_SPACE_TOKENS) refuse("cached or rejected rows in row space " + std::to_string(span.space));
      continue;
    }
    RowList& list = lists[span.space];
    if (list.width != 0 && uint64_t{span.first} + span.count > list.width) {
      refuse("rows " + std::to_string(span.first) + " to " + std::to_string(uint64_t{span.first} + span.count) + " exceed the width, " +
             std::to_string(list.width));
    }
    if (list.rows + span.count > UINT32_MAX) refuse("more than 2^32 rows");
    if (span.count != 0) append(list, span, 0, span.count);
  }
  source.spans.assign(spans, spans + count);
  source.packed = packed;
}

}  // namespace dmi
