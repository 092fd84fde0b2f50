// A step's rows, as runs of consecutive source indices: what the row table's spans mean to the op.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "levels.h"

namespace dmi {

// Rows batch, [first, first + count) of a source with two ROW dimensions.
struct Run {
  uint64_t batch;
  uint64_t first;
  uint64_t count;
};

// Whose `count` consecutive rows of a list are, and the keys that they have: cache slots from key_first on; of the first row, those of
// positions up to `position`.
struct Own {
  uint64_t request;
  uint64_t key_first;
  uint64_t position;
  uint64_t count;
};

// The rows of one space in row-list order: the order of the spans in the row table.
struct RowList {
  uint64_t rows = 0;
  std::vector<Run> runs;  // by (batch, index)
  std::vector<Run> flat;  // by batch * width + index, for one ROW dimension; batch is 0
  std::vector<Own> owns;
  uint64_t batches = 0;  // largest batch + 1
  uint64_t end = 0;      // largest index + 1
  uint64_t flat_end = 0;
  uint64_t width = 0;  // length of an unpacked source's last ROW dimension; 0: not known
};

using RowLists = std::array<RowList, DMI_SPACES>;

// What row lists were made of.
struct RowSource {
  std::vector<dmi_span> spans;
  bool packed = false;
};

// The rows of a step by level, for sites with one gate: what a row table's runs say.
class Selection {
 public:
  Selection(const dmi_gate& gate, std::vector<dmi_clause> clauses);

  bool same(const dmi_gate& gate) const;
  // Whether which groups a request is in matters.
  bool grouped() const { return grouped_; }
  // Gives every row of a step its level. The runs of all spaces go behind `runs`, under this number. `members`: by span; used where
  // grouped().
  void apply(const RowLists& lists, const dmi_span* spans, uint32_t count, const std::vector<Membership>& members, uint16_t number,
             std::vector<dmi_run>& runs);
  // The rows of a level, in row-list order.
  const RowLists& at(uint32_t level) const { return lists_[level]; }
  // Records that are needed to say everything about the rows of a level: captured, and dropped. And about all rows of a space.
  static constexpr uint32_t records_of(uint32_t level) { return level == DMI_LEVEL_OFF ? 1 : 2; }
  uint32_t records(uint32_t space) const;

 private:
  const dmi_gate gate_;
  const std::vector<dmi_clause> clauses_;
  const bool grouped_;
  std::vector<const dmi_clause*> asking_;  // of the span at hand
  std::array<RowLists, DMI_LEVELS> lists_;
  std::array<std::vector<dmi_run>, DMI_LEVELS> runs_;  // of the space at hand
};

// dmi_pack_rows.
bool pack_rows(const dmi_pack& pack, uint32_t count);
// Rows of the token space that the spans say a step has.
uint64_t token_rows(const dmi_span* spans, uint32_t count);
// Fills `lists`, keeping their memory. Throws Error on a span that no source can have. Where they were made of the same rows, of which only
// the positions moved on, as from token to token, little is done.
void build_row_lists(RowLists& lists, RowSource& source, const dmi_span* spans, uint32_t count, const uint32_t width[DMI_SPACES],
                     bool packed);

}  // namespace dmi
