// Package trigger evaluates the conditions of a policy's triggers on rows as they pass, exactly: every row of the sites that a trigger selects is looked at, on the goroutine
// that hands it on. What a firing sets off never holds rows up: each of its consequences is bounded, and says what it left out.
//
//	probe.go      linear probes, from safetensors files
//	condition.go  whether a row meets a condition
//	watch.go      which rows are looked at, who is told, how often
//	webhook.go    delivery, tried again, bounded
package trigger
