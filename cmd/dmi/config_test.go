package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"dmi/store"
)

func write(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func flagLayer(pairs ...string) source {
	s := source{name: "flags", values: map[string]any{}, each: map[string]string{}}
	for i := 0; i < len(pairs); i += 2 {
		s.values[pairs[i]], s.each[pairs[i]] = pairs[i+1], "flag --set"
	}
	return s
}

func TestLaterSourcesWin(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "some.yaml"), "store:\n  buffer_mib: 1\n  chunk_kib: 2\n  segment_mib: 3\nhttp:\n  hosts: [a.example, b.example]\nread_only: true\n")
	environment := []string{"DMI_STORE=" + dir, "DMI_STORE_CHUNK_KIB=20", "DMI_STORE_SEGMENT_MIB=30", "DMI_HTTP_ORIGINS=https://a.example,https://b.example", "DMI_EXIT_GRACE_S=0.5",
		"DMI_DISABLE=1", "DMI_PYTHON=python", "HOME=/root"}
	c, err := loadConfig(file, environment, flagLayer("store.segment_mib", "300"))
	if err != nil {
		t.Fatal(err)
	}
	want := defaultConfig()
	want.Store.Path, want.Store.BufferMiB, want.Store.ChunkKiB, want.Store.SegmentMiB = dir, 1, 20, 300
	want.HTTP.Hosts, want.HTTP.Origins = []string{"a.example", "b.example"}, []string{"https://a.example", "https://b.example"}
	want.ReadOnly, want.ExitGrace = true, 0.5
	if !reflect.DeepEqual(c.Config, want) {
		t.Errorf("got  %+v\nwant %+v", c.Config, want)
	}
	for key, origin := range map[string]string{"store.path": "environment DMI_STORE", "store.buffer_mib": "file " + file, "store.chunk_kib": "environment DMI_STORE_CHUNK_KIB",
		"store.segment_mib": "flag --set", "store.sync_mib": "default", "http.hosts": "file " + file} {
		if c.origin[key] != origin {
			t.Errorf("%s comes from %q, want %q", key, c.origin[key], origin)
		}
	}
	if len(c.lines()) != len(settings) {
		t.Errorf("%d lines for %d keys", len(c.lines()), len(settings))
	}
}

func TestStoresOwnFile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "dmi.yaml"), "store: {buffer_mib: 7}\nlog:\n")
	c, err := loadConfig("", nil, flagLayer("store.path", dir))
	if err != nil || c.Store.BufferMiB != 7 {
		t.Fatalf("%+v %v", c, err)
	}
	write(t, filepath.Join(dir, "dmi.yaml"), "store: {path: elsewhere}\n")
	if _, err := loadConfig("", []string{"DMI_STORE=" + dir}, flagLayer()); err != nil {
		t.Errorf("a path that the environment overrides: %v", err)
	}
	t.Chdir(dir)
	if err := os.Mkdir("captures", 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, "captures/dmi.yaml", "store: {path: elsewhere}\n")
	if _, err := loadConfig("", nil, flagLayer()); err == nil || !strings.Contains(err.Error(), "store's own file") {
		t.Errorf("a store's file that points elsewhere: %v", err)
	}
}

func TestBadConfigurationSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		what, yaml  string
		environment []string
		flags       []string
		want        []string
	}{
		{"unknown key", "store: {bufer_mib: 1}", nil, nil, []string{"store.bufer_mib", "did you mean store.buffer_mib", "test.yaml"}},
		{"unknown section", "stor: {buffer_mib: 1}", nil, nil, []string{"stor.buffer_mib", "store.buffer_mib"}},
		{"unknown scalar", "colour: red", nil, nil, []string{"colour", "did you mean"}},
		{"unknown variable", "", []string{"DMI_STORE_BUFER_MIB=1"}, nil, []string{"DMI_STORE_BUFER_MIB", "did you mean DMI_STORE_BUFFER_MIB"}},
		{"unknown --set", "", nil, []string{"http.port", "80"}, []string{"http.port", "flags"}},
		{"section as a value", "store: 5", nil, nil, []string{"there is no key store"}},
		{"text for a number", "store: {buffer_mib: many}", nil, nil, []string{"store.buffer_mib", "many is not a whole number", "test.yaml"}},
		{"text for a number in a variable", "", []string{"DMI_STORE_BUFFER_MIB=many"}, nil, []string{"DMI_STORE_BUFFER_MIB", "whole number"}},
		{"text for a switch", "read_only: perhaps", nil, nil, []string{"read_only", "true or false"}},
		{"map for a number", "store: {buffer_mib: {x: 1}}", nil, nil, []string{"store.buffer_mib.x"}},
		{"not YAML", "store: [", nil, nil, []string{"test.yaml"}},
		{"zero", "store: {buffer_mib: 0}", nil, nil, []string{"store.buffer_mib", "out of range"}},
		{"negative time", "exit_grace_s: -1", nil, nil, []string{"exit_grace_s", "out of range"}},
		{"not a number at all", "exit_grace_s: .nan", nil, nil, []string{"exit_grace_s", "out of range"}},
		{"unknown level", "log: {level: loud}", nil, nil, []string{"log.level", "debug or info"}},
		{"open address without TLS", "http: {address: '0.0.0.0:80'}", nil, nil, []string{"http.address", "not loopback", "tls_cert_file"}},
		{"name without TLS", "http: {address: 'gpu7:80'}", nil, nil, []string{"http.address", "not loopback"}},
		{"no port", "http: {address: localhost}", nil, nil, []string{"http.address", "HOST:PORT"}},
		{"certificate without key", "http: {tls_cert_file: x}", nil, nil, []string{"tls_key_file"}},
		{"open admin", "admin: {address: '0.0.0.0:6060'}", nil, nil, []string{"admin.address", "127.0.0.1"}},
		{"no store", "store: {path: ''}", nil, nil, []string{"store.path"}},
	} {
		_, err := loadConfig(write(t, filepath.Join(dir, "test.yaml"), c.yaml), c.environment, flagLayer(c.flags...))
		if err == nil {
			t.Errorf("%s: accepted", c.what)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q does not say %q", c.what, err, part)
			}
		}
	}
	if _, err := loadConfig(filepath.Join(dir, "none.yaml"), nil, flagLayer()); err == nil || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("a file that is not there: %v", err)
	}
	for _, address := range []string{"127.0.0.1:0", "localhost:80", "[::1]:80"} {
		if _, err := loadConfig("", nil, flagLayer("http.address", address, "store.path", dir)); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
}

func TestEveryKeyIsDocumentedAndReachable(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range settings {
		if s.help == "" {
			t.Errorf("%s says nothing of itself", s.key)
		}
		name := environmentName(s.key)
		if seen[name] {
			t.Errorf("%s: its variable %s is another key's too", s.key, name)
		}
		seen[name] = true
		value := map[reflect.Kind]string{reflect.Bool: "true", reflect.Int: "3", reflect.Float64: "2.5", reflect.String: "debug", reflect.Slice: "a,b"}[s.kind.Kind()]
		layer, err := readEnvironment([]string{name + "=" + value})
		if err != nil {
			t.Fatal(err)
		}
		c, err := mergeConfig(layer)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.ValueOf(c.Config).FieldByIndex(s.index)
		if text := strings.Trim(strings.ReplaceAll(fmt.Sprint(got.Interface()), " ", ","), "[]"); text != value {
			t.Errorf("%s: %s gave %s", name, value, text)
		}
	}
	for flag, key := range serveFlags {
		if !slices.Contains(settingKeys(), key) {
			t.Errorf("flag --%s sets %s, which is no key", flag, key)
		}
	}
}

// The store's keys reach the store, each in its own unit.
func TestStoreOptions(t *testing.T) {
	c := defaultConfig()
	told := false
	o := c.storeOptions(func(string, string, string) { told = true })
	if o.Log("", "", ""); !told || o.Direct != nil {
		t.Error("log or direct is not passed on")
	}
	o.Log = nil
	want := store.Options{BufferMiB: 256, ChunkKiB: 1024, FlushAge: 1e9, SegmentMiB: 256, SegmentTensors: 32768, SegmentAge: 3600e9, SyncMiB: 128, SyncAge: 1e9, GroupCommit: 1e8, FullDiskWait: 30e9, TidyEvery: 10e9, CompactAfter: 30e9, CompactMiBs: 128, StallAfter: 10e9, LagAfter: 10e9}
	if !reflect.DeepEqual(o, want) {
		t.Errorf("got %+v, want %+v", o, want)
	}
	c.Store.Direct = "false"
	if o := c.storeOptions(nil); o.Direct == nil || *o.Direct {
		t.Error("store.direct=false is not passed on")
	}
}

func FuzzConfig(f *testing.F) {
	for _, seed := range []string{"store: {buffer_mib: 1}", "a: &a [*a]", "store:\n  path: x\n  path: y", "? {a: b}\n: c", "!!binary x: y", "1: 2", "store.path: x", "http: {hosts: [1, {}]}", "- a", "null", "\xff"} {
		f.Add(seed, "DMI_STORE_CHUNK_KIB=9")
	}
	file := filepath.Join(f.TempDir(), "dmi.yaml")
	f.Fuzz(func(t *testing.T, text, variable string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := loadConfig(file, []string{variable}, flagLayer())
		if err == nil && (c.Store.BufferMiB < 1 || c.Store.Path == "" || c.StopTimeout < 0) {
			t.Errorf("accepted: %+v", c.Config)
		}
		if err != nil && !strings.HasPrefix(err.Error(), "configuration") {
			t.Errorf("an error that does not say what it is about: %v", err)
		}
	})
}
