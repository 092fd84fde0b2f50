package main

import (
	"dmi/internal/vfs"
	"dmi/policy"
	"dmi/steer"
	"dmi/store"
	"dmi/trigger"
)

// openHelm takes up the policy of a store. Without a watch it is only read. Close the ledger after all else.
func openHelm(dir string, s *store.Store, names steer.Requests, watch *trigger.Watch, event func(level, code, message string)) (*steer.Helm, *policy.Ledger, error) {
	readOnly := watch == nil
	ledger, err := policy.OpenLedger(vfs.OS{}, dir, !readOnly)
	if err != nil {
		return nil, nil, err
	}
	helm, err := steer.New(steer.Options{Ledger: ledger, Store: s, Event: event, Watch: watch, Requests: names, Dir: dir, ReadOnly: readOnly})
	if err != nil {
		ledger.Close()
		return nil, nil, err
	}
	return helm, ledger, nil
}
