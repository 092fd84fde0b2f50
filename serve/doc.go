// Package serve is the engine's only door for readers: HTTP as docs/api.md says and openapi.yaml fixes. It plans nothing and reads no file itself:
// package query answers, package live streams.
//
// A Server makes one handler for each way in: Local for those whom a socket's permissions let through, Remote for TCP, where Host,
// Origin and a token are checked. Every route states the scope it needs and the arguments it takes; others are refused.
package serve
