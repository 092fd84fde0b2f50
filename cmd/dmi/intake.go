package main

import (
	"dmi/control"
	"dmi/internal/ringtape"
	"dmi/live"
	"dmi/pipeline"
	"dmi/serve"
	"dmi/tensor"
)

// newIntake makes the producers' side of an engine: what it drains goes to the store, and past live subscribers.
func (e *engine) newIntake() (*control.Server, error) {
	o := control.Options{
		Store: e.names, Live: e.hub, Triggers: e.watch, Log: e.log,
		Event: func(level, code, session, message string) { // control logs by itself
			e.hub.Event(live.Event{Level: level, Code: code, Session: session, Message: message})
		},
		Engine: e.said.EngineID, Version: e.said.Version, StorePath: e.dir, HTTPURL: e.said.HTTP, HTTPUnix: e.said.HTTPUnix,
		Sessions: e.config.Control.Sessions, BusyPoll: seconds(e.config.Control.BusyPoll), Gates: e.helm.Gates(), Memory: e.helm.Memory,
		Rules: func(session uint32, mode string) pipeline.Rules { return e.helm.Rules(session, mode) },
	}
	if e.config.Control.Admission == "token" {
		o.Token = e.token
	}
	if dir := e.config.Control.RecordDir; dir != "" {
		recorder, err := ringtape.NewRecorder(dir, 0)
		if err != nil {
			return nil, err
		}
		o.Recorder = recorder
	}
	intake := control.New(o)
	e.helm.Steer(intake)
	return intake, nil
}

// attached says how producers are doing, in the words of the HTTP API.
func (e *engine) attached() []serve.Attached {
	list := []serve.Attached{}
	for _, s := range e.intake.Sessions() {
		p := s.Producer
		a := serve.Attached{
			Session: s.ID, Number: s.Number, Mode: s.Mode, Model: s.Model, AttachedAt: s.Attached,
			Occupancies: map[string]serve.Occupancy{"payload_bytes": serve.Occupancy(s.Payload), "staging_bytes": serve.Occupancy(s.Staging),
				"spill_bytes": serve.Occupancy(s.Spill), "batches": serve.Occupancy(s.Queue)},
			Steps: p.Steps, Records: p.Records, CapturedRows: p.CapturedRows, Captured: p.CapturedBytes, OtherRows: map[string]uint64{},
			Waits: p.Waits, WaitNs: p.WaitNS, OpCalls: p.OpCalls, OpNs: p.OpNS, Outside: p.Outside, SpilledBytes: p.SpilledBytes,
			KeptRows: p.KeptRows, Copied: s.Drain.Copied, Offered: s.Drain.Offered, Fetched: s.Drain.Fetched, ExpiredRows: s.Drain.Expired,
			LagNs: s.Drain.Lag.Nanoseconds(),
		}
		var records serve.Occupancy
		for _, lane := range s.Records {
			records.Used += lane.Used
			records.Capacity += lane.Capacity
		}
		a.Occupancies["records"] = records
		for reason, rows := range p.OtherRows {
			if rows > 0 {
				a.OtherRows[tensor.Reason(reason).String()] += rows
			}
		}
		list = append(list, a)
	}
	return list
}
