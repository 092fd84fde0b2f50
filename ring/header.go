package ring

import (
	"fmt"
	"slices"
)

const (
	page          = 4096
	maxRegion     = 1 << 40 // bytes of any one region; a bound that only a lie exceeds, so that sums of all of them cannot overflow
	maxRecords    = 1 << 24
	maxCommands   = 1 << 20
	minRecords    = 4
	maxTableBytes = 1 << 32
)

func badHeader(field string, value any, want string) error {
	return fmt.Errorf("ring: header.%s is %v: %s", field, value, want)
}

// check says what is wrong with a header of a memory of size bytes, or nothing.
func (h *Header) check(size uint64) error {
	power := func(v uint32) bool { return v != 0 && v&(v-1) == 0 }
	switch {
	case h.Magic != Magic:
		return badHeader("magic", fmt.Sprintf("%#x", h.Magic), fmt.Sprintf("a ring starts with %#x", Magic))
	case h.Version != ABIVersion:
		return badHeader("version", h.Version, fmt.Sprintf("this engine speaks %d; install dmi and the engine from the same release", ABIVersion))
	case h.Mode > ModeComplete:
		return badHeader("mode", h.Mode, "0 is best-effort and 1 complete")
	case h.TotalBytes != size:
		return badHeader("total_bytes", h.TotalBytes, fmt.Sprintf("the memory has %d", size))
	case h.Device > DeviceCUDA:
		return badHeader("device", h.Device, "0 is the CPU and 1 CUDA")
	case h.Lanes < 1 || h.Lanes > MaxLanes:
		return badHeader("lanes", h.Lanes, fmt.Sprintf("1 to %d are possible", MaxLanes))
	case !power(h.RecordCapacity) || h.RecordCapacity < minRecords || h.RecordCapacity > maxRecords:
		return badHeader("record_capacity", h.RecordCapacity, fmt.Sprintf("a power of two from %d to %d is needed", minRecords, maxRecords))
	case !power(h.CommandCapacity) || h.CommandCapacity > maxCommands:
		return badHeader("command_capacity", h.CommandCapacity, fmt.Sprintf("a power of two up to %d is needed", maxCommands))
	case h.SiteCapacity > MaxSites:
		return badHeader("site_capacity", h.SiteCapacity, fmt.Sprintf("at most %d", MaxSites))
	}
	for _, r := range []struct {
		field string
		bytes uint64
		least uint64
	}{{"payload_bytes", h.PayloadBytes, page}, {"table_bytes", h.TableBytes, page}, {"staging_bytes", h.StagingBytes, page}, {"spill_bytes", h.SpillBytes, 0}} {
		if r.bytes%page != 0 || r.bytes < r.least || r.bytes > maxRegion {
			return badHeader(r.field, r.bytes, fmt.Sprintf("a multiple of %d from %d to %d is needed", page, r.least, uint64(maxRegion)))
		}
	}
	if h.TableBytes > maxTableBytes {
		return badHeader("table_bytes", h.TableBytes, fmt.Sprintf("at most %d", uint64(maxTableBytes)))
	}
	return h.checkRegions(size)
}

// checkRegions holds every region inside the memory, behind the header, and apart from every other.
func (h *Header) checkRegions(size uint64) error {
	type region struct {
		field      string
		at, length uint64
	}
	regions := []region{
		{"control_offset", h.ControlOffset, ControlSize},
		{"sites_offset", h.SitesOffset, uint64(h.SiteCapacity) * SiteSize},
		{"gates_offset", h.GatesOffset, uint64(h.SiteCapacity)*(GateSize+KeepSize) + MaxClauses*ClauseSize + MaxWatches*WatchSize + 4*ProbeFloats},
		{"records_offset", h.RecordsOffset, uint64(h.Lanes) * uint64(h.RecordCapacity) * RecordSize},
		{"tables_offset", h.TablesOffset, uint64(h.Lanes) * h.TableBytes},
		{"commands_offset", h.CommandsOffset, uint64(h.CommandCapacity) * CommandSize},
		{"staging_offset", h.StagingOffset, h.StagingBytes},
		{"spill_offset", h.SpillOffset, h.SpillBytes},
	}
	for _, r := range regions {
		switch {
		case r.at%page != 0 || r.at < HeaderSize:
			return badHeader(r.field, r.at, fmt.Sprintf("a multiple of %d behind the header is needed", page))
		case r.at > size || r.length > size-r.at:
			return badHeader(r.field, r.at, fmt.Sprintf("its %d bytes leave the memory's %d", r.length, size))
		}
	}
	slices.SortStableFunc(regions, func(a, b region) int {
		switch {
		case a.at < b.at:
			return -1
		case a.at > b.at:
			return 1
		}
		return 0
	})
	end, before := uint64(0), ""
	for _, r := range regions {
		if r.length == 0 {
			continue
		}
		if r.at < end {
			return badHeader(r.field, r.at, fmt.Sprintf("the region of %s reaches to %d", before, end))
		}
		end, before = r.at+r.length, r.field
	}
	return nil
}
