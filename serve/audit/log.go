package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"
	"time"

	"dmi/internal/vfs"
)

// Options of a Log. Zero fields take the default.
type Options struct {
	FileBytes int64         // size at which a file is closed and the next begun (16 MiB)
	Files     int           // kept at most; the oldest goes (8)
	Wait      time.Duration // that a line may take to be written before its writer goes on without (1 s)
	Engine    string        // for the line that begins a file
	// Tell is told when writing fails, and when it works again. It must not block.
	Tell func(level, code, message string)
}

// Stats are the counters of a Log.
type Stats struct {
	Lines   uint64 // written
	Lost    uint64 // never written
	Failure string // why lines are not written now; "" where they are
}

// Log appends entries to files. Its methods may be called from any goroutine.
type Log struct {
	fs      vfs.FS
	dir     string
	options Options
	queue   chan *pending
	quit    chan struct{}
	done    chan struct{}
	once    sync.Once
	closing error // of the last file; read after done

	// Of the writing goroutine alone.
	file vfs.File
	name string
	size int64
	torn bool // what a failed write left after size is still there

	mu    sync.Mutex
	stats Stats
	owed  uint64 // lost since the last line
	why   string // the first of them were
}

type pending struct {
	entry   Entry
	written chan error // buffered
}

// maxQueue is more than there are readers at once; at the bound lines are lost, and counted.
const maxQueue = 1024

var errHangs = errors.New("the disk takes nothing")

// Open makes the folder, goes on in its newest file, and begins to write. The folder must be written by no one else.
func Open(fs vfs.FS, dir string, o Options) (*Log, error) {
	if o.FileBytes <= 0 {
		o.FileBytes = 16 << 20
	}
	if o.Files <= 0 {
		o.Files = 8
	}
	if o.Wait <= 0 {
		o.Wait = time.Second
	}
	if o.Tell == nil {
		o.Tell = func(string, string, string) {}
	}
	l := &Log{fs: fs, dir: dir, options: o, queue: make(chan *pending, maxQueue), quit: make(chan struct{}), done: make(chan struct{})}
	if err := l.resume(); err != nil {
		return nil, fmt.Errorf("audit: open the record of reads in %s: %w", dir, err)
	}
	go l.run()
	return l, nil
}

// Append writes an entry, its time now where it has none. It returns once the line is with the operating system, or why it is not; a line
// that takes longer than Wait may still be written.
func (l *Log) Append(e Entry) error {
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	p := &pending{e, make(chan error, 1)}
	select {
	case <-l.quit:
		return errors.New("audit: the record of reads is closed")
	default:
	}
	select {
	case l.queue <- p:
	default: // those who wait for the disk fill the queue
		l.lose(1, errHangs)
		return l.failed(errHangs)
	}
	timer := time.NewTimer(l.options.Wait)
	defer timer.Stop()
	select {
	case err := <-p.written:
		return err
	case <-l.done:
		select {
		case err := <-p.written:
			return err
		default:
			return errors.New("audit: the record of reads is closed")
		}
	case <-timer.C:
		err := fmt.Errorf("%w for %v", errHangs, l.options.Wait)
		l.fail(err)
		return l.failed(err)
	}
}

// Stats returns the counters.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Close writes what is queued, makes the file durable and closes it. A disk that hangs is not waited for longer than Wait.
func (l *Log) Close() error {
	l.once.Do(func() { close(l.quit) })
	select {
	case <-l.done:
		return l.closing
	case <-time.After(l.options.Wait):
		return fmt.Errorf("audit: close the record of reads in %s: %w for %v: its last lines may be missing", l.dir, errHangs, l.options.Wait)
	}
}

func (l *Log) run() {
	defer close(l.done)
	for {
		select {
		case p := <-l.queue:
			p.written <- l.write(p.entry)
		case <-l.quit:
			for {
				select {
				case p := <-l.queue:
					p.written <- l.write(p.entry)
					continue
				default:
				}
				break
			}
			err := l.write(Entry{Time: time.Now().UTC(), Event: "close"})
			if l.file != nil {
				err = errors.Join(err, l.file.Sync(), l.file.Close())
			}
			if err != nil {
				l.closing = fmt.Errorf("audit: close the record of reads in %s: %w", l.dir, err)
			}
			return
		}
	}
}

// write appends a line, and before it one that says what is missing.
func (l *Log) write(e Entry) error {
	l.mu.Lock()
	owed, why := l.owed, l.why
	l.mu.Unlock()
	err := error(nil)
	if owed > 0 {
		if err = l.put(Entry{Time: time.Now().UTC(), Event: "lost", Lines: owed, Why: why}); err == nil {
			l.mu.Lock()
			l.owed -= owed
			l.mu.Unlock()
		}
	}
	if err == nil {
		err = l.put(e)
	}
	if err != nil {
		l.lose(1, err)
		return l.failed(err)
	}
	l.mu.Lock()
	was := l.stats.Failure
	l.stats.Failure = ""
	l.stats.Lines++
	l.mu.Unlock()
	if was != "" {
		l.options.Tell("info", "audit", "the record of reads is written again; what is missing is noted in it")
	}
	return nil
}

func (l *Log) lose(lines uint64, why error) {
	l.mu.Lock()
	if l.owed == 0 {
		l.why = why.Error()
	}
	l.owed += lines
	l.stats.Lost += lines
	l.mu.Unlock()
	l.fail(why)
}

// fail tells the operator, once for as long as it lasts.
func (l *Log) fail(why error) {
	l.mu.Lock()
	was := l.stats.Failure
	l.stats.Failure = why.Error()
	l.mu.Unlock()
	if was == "" {
		l.options.Tell("error", "audit", fmt.Sprintf("%v: look at the disk and the folder's permissions; until then reads are not recorded", l.failed(why)))
	}
}

func (l *Log) failed(why error) error {
	return fmt.Errorf("audit: the record of reads in %s cannot be written: %w", l.dir, why)
}

// put appends one line, or nothing.
func (l *Log) put(e Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	if l.file == nil || l.size > 0 && l.size+int64(len(line)) > l.options.FileBytes {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	if l.torn {
		if err := l.file.Truncate(l.size); err != nil {
			return err
		}
		l.torn = false
	}
	if _, err := l.file.WriteAt(line, l.size); err != nil {
		l.torn = l.file.Truncate(l.size) != nil
		return err
	}
	l.size += int64(len(line))
	return nil
}

const namePattern = "audit-%08d.jsonl"

// names lists the files, oldest first.
func (l *Log) names() (names []string, last int, err error) {
	all, err := l.fs.ReadDir(l.dir)
	if err != nil {
		return nil, 0, err
	}
	slices.Sort(all)
	for _, name := range all {
		var n int
		if _, err := fmt.Sscanf(name, namePattern, &n); err == nil && fmt.Sprintf(namePattern, n) == name {
			names, last = append(names, name), n
		}
	}
	return names, last, nil
}

// resume opens the newest file, or begins the first. A line that a kill cut short stays, ended.
func (l *Log) resume() error {
	if err := l.fs.MkdirAll(l.dir); err != nil {
		return err
	}
	names, _, err := l.names()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return l.rotate()
	}
	l.name = names[len(names)-1]
	if l.file, err = l.fs.Open(path.Join(l.dir, l.name), true); err != nil {
		return err
	}
	if l.size, err = l.file.Size(); err == nil && l.size > 0 {
		last := make([]byte, 1)
		if _, err = l.file.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
			if _, err = l.file.WriteAt([]byte{'\n'}, l.size); err == nil {
				l.size++
			}
		}
	}
	if err == nil {
		err = l.put(Entry{Time: time.Now().UTC(), Event: "open", Engine: l.options.Engine})
	}
	if err != nil {
		l.file.Close()
	}
	return err
}

// rotate begins the next file; the oldest make room for it first, so that the bound holds on a disk that is full, too.
func (l *Log) rotate() error {
	names, last, err := l.names()
	if err != nil {
		return err
	}
	gone := ""
	for ; len(names) >= l.options.Files; names = names[1:] {
		if err := l.fs.Remove(path.Join(l.dir, names[0])); err != nil {
			return err
		}
		gone = names[0]
	}
	if l.file != nil {
		if err := l.file.Sync(); err != nil {
			return err
		}
	}
	name := fmt.Sprintf(namePattern, last+1)
	file, err := l.fs.Create(path.Join(l.dir, name), false)
	if err != nil {
		return err
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.name, l.size = file, name, 0
	if err := l.fs.SyncDir(l.dir); err != nil {
		return err
	}
	return l.put(Entry{Time: time.Now().UTC(), Event: "open", Engine: l.options.Engine, Gone: gone})
}
