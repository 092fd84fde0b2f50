package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"dmi/internal/nearest"

	"dmi/internal/vfs"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/v2"
)

// Config is everything about an engine that can be set. A key's name is its path here: `store.buffer_mib`. Later sources win: defaults, then a YAML
// file (--config, else STORE/dmi.yaml where there is one), then the environment (DMI_STORE_BUFFER_MIB; DMI_STORE for the path), then flags.
type Config struct {
	Store        StoreConfig   `koanf:"store"`
	Control      ControlConfig `koanf:"control"`
	HTTP         HTTPConfig    `koanf:"http"`
	Admin        AdminConfig   `koanf:"admin"`
	Audit        AuditConfig   `koanf:"audit"`
	Live         LiveConfig    `koanf:"live"`
	Log          LogConfig     `koanf:"log"`
	ReadOnly     bool          `koanf:"read_only" help:"answer readers only; no lock is taken and nothing is captured"`
	ExitWhenIdle bool          `koanf:"exit_when_idle" help:"end once the last session ended, and none came within exit_grace_s"`
	ExitGrace    float64       `koanf:"exit_grace_s" help:"how long exit_when_idle waits for another session"`
	StopTimeout  float64       `koanf:"stop_timeout_s" help:"most time that a graceful stop takes to drain, seal and commit"`
}

// StoreConfig is where captures go, and how.
type StoreConfig struct {
	Path           string  `koanf:"path" help:"the store's folder; made if it is not there"`
	BufferMiB      int     `koanf:"buffer_mib" help:"rows that wait to be merged and written; at the bound the drain waits"`
	ChunkKiB       int     `koanf:"chunk_kib" help:"size at which the rows of a request and site are written without waiting for more"`
	FlushAge       int     `koanf:"flush_age_ms" help:"how long a row may wait for neighbours"`
	SegmentMiB     int     `koanf:"segment_mib" help:"size at which a segment is sealed"`
	SegmentTensors int     `koanf:"segment_tensors" help:"chunks at which a segment is sealed"`
	SegmentAge     float64 `koanf:"segment_age_s" help:"age at which a segment is sealed"`
	SyncMiB        int     `koanf:"sync_mib" help:"bytes after which data are made durable without being asked"`
	SyncAge        int     `koanf:"sync_age_ms" help:"time after which they are"`
	GroupCommit    int     `koanf:"group_commit_ms" help:"barriers that come within this time share one sync"`
	StallAfter     float64 `koanf:"stall_after_s" help:"how long a write or a sync may take until the store counts as one that cannot be written"`
	LagAfter       float64 `koanf:"lag_after_s" help:"how long a row may wait to be durable until the operator is told"`
	FullDiskWait   float64 `koanf:"full_disk_wait_s" help:"how long a session in complete mode waits for a disk that refuses writes"`
	RetainMiB      int     `koanf:"retain_mib" help:"bytes of segments that are kept; the oldest go; 0: all"`
	RetainAge      float64 `koanf:"retain_age_s" help:"how long rows are kept, at least; at most twice segment_age_s longer; 0: for ever"`
	TidyEvery      float64 `koanf:"tidy_every_s" help:"how often retention and compaction are looked after"`
	CompactAfter   float64 `koanf:"compact_after_s" help:"for how long nothing may have come before segments are rewritten in which requests lie scattered; 0: never"`
	CompactMiBs    int     `koanf:"compact_mib_s" help:"how many MiB a second are written meanwhile, at most"`
	Direct         string  `koanf:"direct" help:"auto, true or false: write past the page cache"`
}

// ControlConfig is the door for producers.
type ControlConfig struct {
	Socket    string  `koanf:"socket" help:"Unix socket for producers; empty: STORE/engine.sock"`
	Group     string  `koanf:"group" help:"a group whose members may open the socket as well (a name or number; the engine's user is one of them); empty: only the engine's user"`
	Admission string  `koanf:"admission" help:"permissions: who may open the socket may attach; token: they send the store's token as well"`
	Sessions  int     `koanf:"sessions" help:"producers at once, at most"`
	BusyPoll  float64 `koanf:"busy_poll_s" help:"for how long the engine looks for a session's next records before it sleeps, while somebody follows tensors live: it keeps a core busy then, as long as models run; 0: not at all, as by default where there are fewer than 8"`
	RecordDir string  `koanf:"record_dir" help:"folder for tapes: what the engine saw of each session, to be replayed (docs/format/ringtape.md); empty: none"`
}

// HTTPConfig is the door for readers.
type HTTPConfig struct {
	Socket       string   `koanf:"socket" help:"Unix socket for readers; empty: STORE/http.sock"`
	Address      string   `koanf:"address" help:"host:port to serve on as well; empty: none. A token is always needed there"`
	TLSCert      string   `koanf:"tls_cert_file" help:"PEM certificate chain; needed on an address that is not loopback"`
	TLSKey       string   `koanf:"tls_key_file" help:"PEM private key"`
	Tokens       string   `koanf:"tokens_file" help:"more tokens, a line each: SCOPE TOKEN NAME (statistics, tensors, text or admin; the name, for the record of reads, may be left out); mode 0600"`
	Hosts        []string `koanf:"hosts" help:"names that the server may be called by, besides localhost"`
	Origins      []string `koanf:"origins" help:"origins of web pages that may call it, besides its own"`
	Requests     int      `koanf:"requests" help:"requests served at once, streams apart; more get 503"`
	StallTimeout float64  `koanf:"stall_timeout_s" help:"a reader that takes nothing for so long is cut off"`
	Heartbeat    float64  `koanf:"heartbeat_s" help:"between signs of life on a silent stream"`
}

// AdminConfig is the door for operators.
type AdminConfig struct {
	Address string `koanf:"address" help:"loopback host:port for pprof, metrics and health, without a token; empty: none"`
}

// AuditConfig is the record of reads.
type AuditConfig struct {
	Dir        string `koanf:"dir" help:"folder for the record of who read what (docs/format/audit.md); empty: STORE/audit, and none with read_only"`
	Statistics bool   `koanf:"statistics" help:"record reads of statistics, lists and books as well; those of tensors and text always are"`
	Required   bool   `koanf:"required" help:"refuse a read that cannot be recorded; else it is answered, and the gap is told and counted"`
	FileMiB    int    `koanf:"file_mib" help:"size at which the next file of the record is begun"`
	Files      int    `koanf:"files" help:"files of the record that are kept; the oldest makes room"`
}

// LiveConfig bounds live subscribers.
type LiveConfig struct {
	Subscribers  int `koanf:"subscribers" help:"live subscribers at once, at most"`
	QueueFrames  int `koanf:"queue_frames" help:"chunks that wait for one subscriber; at the bound the oldest is dropped, and counted"`
	QueueMiB     int `koanf:"queue_mib" help:"the same, in bytes"`
	RecentEvents int `koanf:"recent_events" help:"events kept for those who come later"`
}

// LogConfig is what is written to stderr.
type LogConfig struct {
	Level  string `koanf:"level" help:"debug, info, warning or error"`
	Format string `koanf:"format" help:"text or json"`
}

func defaultConfig() Config {
	return Config{
		Store: StoreConfig{Path: "captures", BufferMiB: 256, ChunkKiB: 1024, FlushAge: 1000, SegmentMiB: 256, SegmentTensors: 32768, SegmentAge: 3600,
			SyncMiB: 128, SyncAge: 1000, GroupCommit: 100, FullDiskWait: 30, TidyEvery: 10, CompactAfter: 30, CompactMiBs: 128, StallAfter: 10, LagAfter: 10, Direct: "auto"},
		Control:     ControlConfig{Admission: "permissions", Sessions: 64, BusyPoll: busyPoll()},
		HTTP:        HTTPConfig{Requests: 256, StallTimeout: 60, Heartbeat: 15, Hosts: []string{}, Origins: []string{}},
		Audit:       AuditConfig{FileMiB: 16, Files: 8},
		Live:        LiveConfig{Subscribers: 512, QueueFrames: 8192, QueueMiB: 32, RecentEvents: 256},
		Log:         LogConfig{Level: "info", Format: "text"},
		ExitGrace:   2,
		StopTimeout: 30,
	}
}

// setting is one key of Config.
type setting struct {
	key, help string
	index     []int
	kind      reflect.Type
}

var settings = listSettings(reflect.TypeFor[Config](), "", nil)

func listSettings(t reflect.Type, prefix string, index []int) (all []setting) {
	for i := range t.NumField() {
		f := t.Field(i)
		key, at := prefix+f.Tag.Get("koanf"), append(slices.Clone(index), i)
		if f.Type.Kind() == reflect.Struct {
			all = append(all, listSettings(f.Type, key+".", at)...)
		} else {
			all = append(all, setting{key, f.Tag.Get("help"), at, f.Type})
		}
	}
	return all
}

func settingKeys() []string {
	keys := make([]string, len(settings))
	for i, s := range settings {
		keys[i] = s.key
	}
	return keys
}

// environmentName is where a key is looked for in the environment.
func environmentName(key string) string {
	if key == "store.path" {
		return "DMI_STORE"
	}
	return "DMI_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// effective is a Config and where each value came from.
type effective struct {
	Config
	origin map[string]string // by key: default, environment DMI_..., flag ..., or a file's name
	files  vfs.FS            // where the store lies; nil: the machine's. Tests give one that breaks
}

// source is a layer of configuration.
type source struct {
	name   string // in errors, and as an origin
	values map[string]any
	each   map[string]string // origin by key, where they differ
}

// loadConfig merges the sources. file is --config, or "". environment is like os.Environ().
func loadConfig(file string, environment []string, flags source) (*effective, error) {
	fromEnvironment, err := readEnvironment(environment)
	if err != nil {
		return nil, err
	}
	// The store's own file is found by what the others say of the store.
	early, err := mergeConfig(fromEnvironment, flags)
	if err != nil {
		return nil, err
	}
	var layers []source
	optional := file == ""
	if optional {
		file = filepath.Join(early.Store.Path, "dmi.yaml")
	}
	switch text, err := os.ReadFile(file); {
	case err == nil:
		layer, err := parseFile(file, text)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	case optional && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ENOTDIR)):
	default:
		return nil, fmt.Errorf("configuration: %w", err)
	}
	c, err := mergeConfig(append(layers, fromEnvironment, flags)...)
	if err != nil {
		return nil, err
	}
	if optional && c.Store.Path != early.Store.Path {
		return nil, fmt.Errorf("configuration file %s: store.path cannot be set in the store's own file; leave it out, or give the file with --config", file)
	}
	return c, c.validate()
}

func parseFile(name string, text []byte) (source, error) {
	tree, err := yaml.Parser().Unmarshal(text)
	if err != nil {
		return source{}, fmt.Errorf("configuration file %s: %w", name, err)
	}
	k := koanf.New(".")
	if err := k.Load(confmap.Provider(tree, ""), nil); err != nil {
		return source{}, fmt.Errorf("configuration file %s: %w", name, err)
	}
	return source{name: "file " + name, values: k.All()}, nil
}

// readEnvironment takes variables whose names are those of keys. One that begins like a section's keys and is none is an error; other DMI_ variables
// are for other parts (DMI_DISABLE, DMI_TOKEN).
func readEnvironment(environment []string) (source, error) {
	byName, sections := map[string]string{}, map[string]bool{}
	var names []string
	for _, s := range settings {
		name := environmentName(s.key)
		byName[name] = s.key
		names = append(names, name)
		if section, _, nested := strings.Cut(s.key, "."); nested {
			sections["DMI_"+strings.ToUpper(section)+"_"] = true
		}
	}
	layer := source{name: "environment", values: map[string]any{}, each: map[string]string{}}
	for _, pair := range environment {
		name, value, _ := strings.Cut(pair, "=")
		if key, known := byName[name]; known {
			layer.values[key] = value
			layer.each[key] = "environment " + name
			continue
		}
		for section := range sections {
			if strings.HasPrefix(name, section) {
				return source{}, unknownKey("environment", name, names)
			}
		}
	}
	return layer, nil
}

func unknownKey(where, key string, known []string) error {
	return fmt.Errorf("configuration: %s: there is no key %s; did you mean %s? (`dmi config` lists all)", where, key, strings.Join(nearest.Names(known, key, 3), ", "))
}

// mergeConfig puts layers over the defaults, in order.
func mergeConfig(layers ...source) (*effective, error) {
	c := &effective{Config: defaultConfig(), origin: map[string]string{}}
	known := settingKeys()
	for _, key := range known {
		c.origin[key] = "default"
	}
	k := koanf.New(".")
	for _, layer := range layers {
		for key, value := range layer.values {
			if !slices.Contains(known, key) {
				if m, empty := value.(map[string]any); (empty && len(m) == 0 || value == nil) && slices.ContainsFunc(known, func(k string) bool { return strings.HasPrefix(k, key+".") }) {
					delete(layer.values, key) // a section without keys
					continue
				}
				return nil, unknownKey(layer.name, key, known)
			}
			c.origin[key] = layer.name
			if name, own := layer.each[key]; own {
				c.origin[key] = name
			}
		}
		if err := k.Load(confmap.Provider(layer.values, "."), nil); err != nil {
			return nil, fmt.Errorf("configuration: %s: %w", layer.name, err)
		}
	}
	for _, s := range settings {
		if !k.Exists(s.key) {
			continue
		}
		field := reflect.ValueOf(&c.Config).Elem().FieldByIndex(s.index)
		decoder, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{Result: field.Addr().Interface(), WeaklyTypedInput: true,
			DecodeHook: mapstructure.StringToSliceHookFunc(",")})
		if err == nil {
			err = decoder.Decode(k.Get(s.key))
		}
		if err != nil {
			return nil, fmt.Errorf("configuration: %s (%s): %v is not a %s", s.key, c.origin[s.key], k.Get(s.key), kindName(s.kind))
		}
	}
	return c, nil
}

func kindName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "whole number"
	case reflect.Float64:
		return "number"
	case reflect.Slice:
		return "list of strings"
	}
	return "string"
}

// validate says what is wrong with a value, where it came from, and what would do.
func (c *effective) validate() error {
	bad := func(key, format string, args ...any) error {
		return fmt.Errorf("configuration: %s (%s): %s", key, c.origin[key], fmt.Sprintf(format, args...))
	}
	value := reflect.ValueOf(c.Config)
	for _, s := range settings {
		switch v := value.FieldByIndex(s.index); v.Kind() {
		case reflect.Int:
			least := int64(1)
			if s.key == "store.retain_mib" { // everything is kept
				least = 0
			}
			if v.Int() < least || v.Int() > 1<<31 {
				return bad(s.key, "%d is out of range: say %d to %d", v.Int(), least, 1<<31)
			}
		case reflect.Float64:
			if !(v.Float() >= 0 && v.Float() <= 1e9) {
				return bad(s.key, "%v is out of range: say 0 to 1e9", v.Float())
			}
		}
	}
	one := func(key, value string, of ...string) error {
		if !slices.Contains(of, value) {
			return bad(key, "%q: say %s", value, strings.Join(of, " or "))
		}
		return nil
	}
	if err := errors.Join(one("log.level", c.Log.Level, "debug", "info", "warning", "error"), one("log.format", c.Log.Format, "text", "json"),
		one("control.admission", c.Control.Admission, "permissions", "token"), one("store.direct", c.Store.Direct, "auto", "true", "false")); err != nil {
		return err
	}
	if c.Store.Path == "" {
		return bad("store.path", "is empty: name a folder")
	}
	if (c.HTTP.TLSCert == "") != (c.HTTP.TLSKey == "") {
		return bad("http.tls_cert_file", "certificate and key come together: set http.tls_cert_file and http.tls_key_file, or neither")
	}
	if a := c.HTTP.Address; a != "" {
		loopback, err := isLoopback(a)
		if err != nil {
			return bad("http.address", "%v", err)
		}
		if !loopback && c.HTTP.TLSCert == "" {
			return bad("http.address", "%s is not loopback, where tokens and tensors would go unencrypted: set http.tls_cert_file and http.tls_key_file, or serve on 127.0.0.1", a)
		}
	}
	if a := c.Admin.Address; a != "" {
		loopback, err := isLoopback(a)
		if err != nil {
			return bad("admin.address", "%v", err)
		}
		if !loopback {
			return bad("admin.address", "%s is not loopback: whoever reaches this listener reads memory profiles; use 127.0.0.1", a)
		}
	}
	return nil
}

// isLoopback looks at the address as it is written: a name that resolves to loopback today may not tomorrow.
func isLoopback(address string) (bool, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false, fmt.Errorf("%q is not HOST:PORT: %w", address, err)
	}
	if host == "localhost" {
		return true, nil
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback(), nil
}

// configLine is one key as `dmi config` prints it.
type configLine struct {
	Key    string `json:"key"`
	Value  any    `json:"value"`
	Origin string `json:"origin"`
	Help   string `json:"help"`
}

func (c *effective) lines() []configLine {
	value := reflect.ValueOf(c.Config)
	lines := make([]configLine, len(settings))
	for i, s := range settings {
		lines[i] = configLine{s.key, value.FieldByIndex(s.index).Interface(), c.origin[s.key], s.help}
	}
	return lines
}

// busyPoll is a decoding step of most models, where a core can be spared for it.
func busyPoll() float64 {
	if runtime.GOMAXPROCS(0) < 8 {
		return 0
	}
	return 0.02
}
