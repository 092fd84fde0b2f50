package serve

import (
	"net/http"
	"runtime"

	"dmi/tensor"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metric is one line of docs/metrics.md. Its name and labels are a promise.
type metric struct {
	*prometheus.Desc
	kind prometheus.ValueType
}

func counter(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc(name, help, labels, nil), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue}
}

// collector reads everything at the moment it is asked, from those who count. No label carries a request, and sessions are summed.
type collector struct {
	server *Server

	buildInfo, formats, up, produced, rows                                                       metric
	segments, segmentBytes, manifestBytes, chunks, written, syncs, lastSync                      metric
	durableLag, diskFree, buffer, bufferBound, streams, failing, recovered, behind               metric
	expired, retiredSegments, retiredBytes, compactedSegments, compactedBytes, stalled, failures metric
	attached, occupancy, capacity, drainLag, producerSteps, producerRecords                      metric
	capturedRows, capturedBytes, otherRows, waits, waitSeconds, opCalls, opSeconds               metric
	kept, copied, offered, fetched, letGo                                                        metric
	outside, spilled                                                                             metric
	stopped, refused, expelled                                                                   metric
	subscribers, subscriberFrames, subscriberDroppedRows, subscriberDroppedEvents                metric
	auditLines, auditLost, auditFailing                                                          metric
	lowered, triggerRows, triggerFirings, webhooks                                               metric
}

func newCollector(s *Server) *collector {
	return &collector{
		server:    s,
		buildInfo: gauge("dmi_build_info", "1; what runs, as labels.", "version", "revision", "go"),
		formats:   gauge("dmi_format_version", "Version of what the engine writes and speaks; it reads earlier ones too.", "format"),
		up:        gauge("dmi_start_time_seconds", "Unix time at which the engine started."),
		produced:  counter("dmi_rows_produced_total", "Rows owed: of every site of every step, over the store's life. Counted apart from dmi_rows_total."),
		rows:      counter("dmi_rows_total", "Rows whose fate is decided, over the store's life.", "outcome", "reason", "level"),

		segments:      gauge("dmi_store_segments", "Sealed segments."),
		segmentBytes:  gauge("dmi_store_segment_bytes", "Bytes of all segments, the open one included."),
		manifestBytes: gauge("dmi_store_manifest_bytes", "Bytes of step manifests."),
		chunks:        gauge("dmi_store_chunks", "Stored chunks."),
		written:       counter("dmi_store_written_bytes_total", "Bytes of chunks written since the engine started."),
		syncs:         counter("dmi_store_syncs_total", "Times that data were made durable since the engine started."),
		lastSync:      gauge("dmi_store_last_sync_seconds", "How long the last sync took."),
		durableLag:    gauge("dmi_store_durable_lag_seconds", "Age of the oldest row that is not yet durable."),
		diskFree:      gauge("dmi_store_disk_free_bytes", "Free bytes where the store lies."),
		buffer:        gauge("dmi_store_buffer_bytes", "Bytes of memory for rows that wait to be merged and written, and for what is kept about them."),
		bufferBound:   gauge("dmi_store_buffer_bound_bytes", "Bound of dmi_store_buffer_bytes, at which the drain waits."),
		streams:       gauge("dmi_store_streams", "Pairs of request and site in the buffer."),
		failing:       gauge("dmi_store_failing", "1 while the store cannot be written."),
		failures:      counter("dmi_store_failures_total", "Times that the store began to be one that cannot be written, since the engine started."),
		stalled:       gauge("dmi_store_stalled_seconds", "How long the disk has not answered the oldest write or sync under way; 0: none is."),
		recovered:     gauge("dmi_store_recovered_lost_rows", "Rows that the last start had to book lost(engine_exit)."),
		behind:        gauge("dmi_store_catalogue_behind", "Books and requests not yet in the catalogue."),

		expired:           counter("dmi_store_expired_rows_total", "Captured rows that retention or deletion took, over the store's life."),
		retiredSegments:   counter("dmi_store_retired_segments_total", "Segments that retention removed since the engine started."),
		retiredBytes:      counter("dmi_store_retired_bytes_total", "Bytes of dmi_store_retired_segments_total."),
		compactedSegments: counter("dmi_store_compacted_segments_total", "Segments that compaction wrote anew since the engine started."),
		compactedBytes:    counter("dmi_store_compacted_bytes_total", "Bytes of chunks that compaction wrote."),

		stopped:  counter("dmi_engine_stopped_seconds_total", "Time in which the engine's process did not run, since it started: stopped, frozen or swapped out, for 3 s or more at a time."),
		refused:  counter("dmi_producers_refused_total", "Producers that were not admitted, since the engine started."),
		expelled: counter("dmi_producers_expelled_total", "Producers that were thrown out for what they said or wrote, since the engine started."),

		attached:        gauge("dmi_producers", "Producers attached."),
		occupancy:       gauge("dmi_queue_used", "How much of a bounded queue is in use, summed over producers; bytes or slots as its name says.", "queue"),
		capacity:        gauge("dmi_queue_capacity", "Bound of dmi_queue_used.", "queue"),
		drainLag:        gauge("dmi_drain_lag_seconds", "Age of the oldest record that was published and is not yet drained."),
		producerSteps:   gauge("dmi_producer_steps", "Steps opened by the producers attached now."),
		producerRecords: gauge("dmi_producer_records", "Records published by the producers attached now."),
		capturedRows:    gauge("dmi_producer_captured_rows", "Rows captured, as the producers attached now count them."),
		capturedBytes:   gauge("dmi_producer_captured_bytes", "Bytes captured, as the producers attached now count them."),
		otherRows:       gauge("dmi_producer_other_rows", "Rows published with another outcome, as the producers attached now count them.", "mode", "reason"),
		waits:           gauge("dmi_producer_waits", "Times that the model waited for the engine, producers attached now; in best-effort mode it never should.", "mode"),
		waitSeconds:     gauge("dmi_producer_wait_seconds", "Time that the model waited for the engine, producers attached now.", "mode"),
		opCalls:         gauge("dmi_producer_op_calls", "Calls of the capture op, producers attached now."),
		opSeconds:       gauge("dmi_producer_op_seconds", "Host time inside the capture op, waits included, producers attached now."),
		outside:         gauge("dmi_producer_outside", "Tensors offered outside an open step, producers attached now."),
		spilled:         gauge("dmi_producer_spilled_bytes", "Bytes that went by way of the spill ring, producers attached now: what is little, and in complete mode what found no room elsewhere."),
		kept:            gauge("dmi_producer_kept_rows", "Rows captured in full because a trigger's condition was met, producers attached now."),
		copied:          gauge("dmi_drain_copied_bytes", "Bytes that copy commands moved from payload rings to staging: what crosses PCIe, where there is one; producers attached now."),
		offered:         gauge("dmi_drain_offered_bytes", "Bytes that lay in payload rings to be fetched or not, producers attached now."),
		fetched:         gauge("dmi_drain_fetched_bytes", "Bytes that lay in payload rings to be fetched or not, and were, producers attached now."),
		letGo:           gauge("dmi_drain_expired_rows", "Rows that lay in payload rings to be fetched or not, and were let go before their step had ended, producers attached now."),

		subscribers:             gauge("dmi_live_subscribers", "Live subscribers.", "kind"),
		subscriberFrames:        counter("dmi_live_frames_total", "Chunks handed to live subscribers."),
		subscriberDroppedRows:   counter("dmi_live_dropped_rows_total", "Rows that live subscribers were too slow for."),
		subscriberDroppedEvents: counter("dmi_live_dropped_events_total", "Events that live subscribers were too slow for."),

		auditLines:   counter("dmi_audit_lines_total", "Lines of the record of reads that were written since the engine started."),
		auditLost:    counter("dmi_audit_lost_lines_total", "Lines of the record of reads that could not be written."),
		auditFailing: gauge("dmi_audit_failing", "1 while the record of reads cannot be written."),

		lowered:        gauge("dmi_policy_lowered_rules", "Rules that overload holds below their level."),
		triggerRows:    counter("dmi_trigger_rows_total", "Rows that met a trigger's condition, since its policy came into force.", "trigger"),
		triggerFirings: counter("dmi_trigger_firings_total", "Times that a trigger fired, outside its cooldown, since its policy came into force.", "trigger"),
		webhooks:       counter("dmi_webhook_deliveries_total", "Firings for webhooks since the engine started: delivered, failed after all tries, dropped because too many waited.", "outcome"),
	}
}

// Describe describes nothing: which metrics there are depends on what is attached and live.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	put := func(m metric, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(m.Desc, m.kind, value, labels...)
	}
	o := c.server.options
	put(c.buildInfo, 1, o.Identity.Version, o.Identity.Revision, runtime.Version())
	for format, version := range o.Formats {
		put(c.formats, float64(version), format)
	}
	put(c.up, float64(o.Identity.Started.UnixNano())/1e9)

	books := o.Store.Books()
	put(c.produced, float64(books.Produced))
	type fate struct{ outcome, reason, level string }
	sums := map[fate]uint64{{tensor.Captured.String(), "", tensor.Full.String()}: 0}
	for _, line := range books.Lines { // summed over sessions, of which there is no bound
		sums[fate{line.Outcome.String(), line.Reason.String(), line.Level.String()}] += line.Rows
	}
	for f, rows := range sums {
		put(c.rows, float64(rows), f.outcome, f.reason, f.level)
	}

	m := o.Store.Stats()
	put(c.segments, float64(m.Segments))
	put(c.segmentBytes, float64(m.SegmentBytes))
	put(c.manifestBytes, float64(m.ManifestBytes))
	put(c.chunks, float64(m.Chunks))
	put(c.written, float64(m.WrittenBytes))
	put(c.syncs, float64(m.Syncs))
	put(c.lastSync, m.LastSync.Seconds())
	put(c.durableLag, m.DurableLag.Seconds())
	put(c.diskFree, float64(m.DiskFree))
	put(c.buffer, float64(m.BufferBytes))
	put(c.bufferBound, float64(m.BufferBound))
	put(c.streams, float64(m.Streams))
	put(c.failing, oneIf(m.Failure != ""))
	put(c.failures, float64(m.Failures))
	put(c.stalled, m.Stalled.Seconds())
	put(c.recovered, float64(m.RecoveredLost))
	put(c.behind, float64(m.CatalogueBehind))
	put(c.expired, float64(m.ExpiredRows))
	put(c.retiredSegments, float64(m.RetiredSegments))
	put(c.retiredBytes, float64(m.RetiredBytes))
	put(c.compactedSegments, float64(m.CompactedSegments))
	put(c.compactedBytes, float64(m.CompactedBytes))

	if o.Attached != nil {
		c.collectProducers(put)
	}
	if o.Troubles != nil {
		t := o.Troubles()
		put(c.stopped, t.Stopped.Seconds())
		put(c.refused, float64(t.Refused))
		put(c.expelled, float64(t.Expelled))
	}
	if o.Live != nil {
		l := o.Live.Metrics()
		put(c.subscribers, float64(l.Subscribers), "chunks")
		put(c.subscribers, float64(l.EventSubscribers), "events")
		put(c.subscriberFrames, float64(l.Frames))
		put(c.subscriberDroppedRows, float64(l.DroppedRows))
		put(c.subscriberDroppedEvents, float64(l.DroppedEvents))
	}
	if o.Audit != nil {
		a := o.Audit.Stats()
		put(c.auditLines, float64(a.Lines))
		put(c.auditLost, float64(a.Lost))
		put(c.auditFailing, oneIf(a.Failure != ""))
	}
	if p := o.Policy; p != nil && !o.Identity.ReadOnly {
		put(c.lowered, float64(p.Lowered()))
		for _, t := range p.Triggers() {
			put(c.triggerRows, float64(t.Rows), t.Name)
			put(c.triggerFirings, float64(t.Fired), t.Name)
		}
		d := p.Deliveries()
		put(c.webhooks, float64(d.Delivered), "delivered")
		put(c.webhooks, float64(d.Failed), "failed")
		put(c.webhooks, float64(d.Dropped), "dropped")
	}
}

func oneIf(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

func (c *collector) collectProducers(put func(metric, float64, ...string)) {
	list := c.server.attached()
	put(c.attached, float64(len(list)))
	var sum Attached
	type other struct{ mode, reason string }
	queues, others := map[string]Occupancy{}, map[other]uint64{}
	waits, waitNs := map[string]uint64{"complete": 0, "best-effort": 0}, map[string]uint64{"complete": 0, "best-effort": 0}
	for _, a := range list {
		sum.Steps += a.Steps
		sum.Records += a.Records
		sum.CapturedRows += a.CapturedRows
		sum.Captured += a.Captured
		waits[a.Mode] += a.Waits
		waitNs[a.Mode] += a.WaitNs
		sum.OpCalls += a.OpCalls
		sum.OpNs += a.OpNs
		sum.Outside += a.Outside
		sum.SpilledBytes += a.SpilledBytes
		sum.KeptRows += a.KeptRows
		sum.Copied += a.Copied
		sum.Offered += a.Offered
		sum.Fetched += a.Fetched
		sum.ExpiredRows += a.ExpiredRows
		sum.LagNs = max(sum.LagNs, a.LagNs)
		for name, q := range a.Occupancies {
			total := queues[name]
			queues[name] = Occupancy{total.Used + q.Used, total.Capacity + q.Capacity}
		}
		for reason, rows := range a.OtherRows {
			others[other{a.Mode, reason}] += rows
		}
	}
	for name, q := range queues {
		put(c.occupancy, float64(q.Used), name)
		put(c.capacity, float64(q.Capacity), name)
	}
	for o, rows := range others {
		put(c.otherRows, float64(rows), o.mode, o.reason)
	}
	for mode := range waits {
		put(c.waits, float64(waits[mode]), mode)
		put(c.waitSeconds, float64(waitNs[mode])/1e9, mode)
	}
	put(c.drainLag, float64(sum.LagNs)/1e9)
	put(c.producerSteps, float64(sum.Steps))
	put(c.producerRecords, float64(sum.Records))
	put(c.capturedRows, float64(sum.CapturedRows))
	put(c.capturedBytes, float64(sum.Captured))
	put(c.opCalls, float64(sum.OpCalls))
	put(c.opSeconds, float64(sum.OpNs)/1e9)
	put(c.outside, float64(sum.Outside))
	put(c.spilled, float64(sum.SpilledBytes))
	put(c.kept, float64(sum.KeptRows))
	put(c.copied, float64(sum.Copied))
	put(c.offered, float64(sum.Offered))
	put(c.fetched, float64(sum.Fetched))
	put(c.letGo, float64(sum.ExpiredRows))
}

// metricsHandler has a registry of its own: two servers in one process do not meet.
func (s *Server) metricsHandler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newCollector(s), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError})
}

func (s *Server) prometheus(w *writer, c *call) error {
	s.metrics.ServeHTTP(w, c.Request)
	return nil
}

// Metrics serves Prometheus's text, without a token: for an admin listener.
func (s *Server) Metrics() http.Handler { return s.metrics }
