//go:build linux

package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"dmi/ring"
	"dmi/store"
	"dmi/tensor"

	"golang.org/x/sys/unix"
)

// producerPlan is the variable in which a process of this test finds that it is to be a producer, and which one.
const producerPlan = "DMI_TEST_PRODUCER"

type mortal struct {
	Session string
	Load    load
	Mode    uint32
	Socket  string
	Tally   string // a file of words, that its parent reads
}

// beProducer plays until it is killed.
func beProducer() error {
	var m mortal
	if err := json.Unmarshal([]byte(os.Getenv(producerPlan)), &m); err != nil {
		return err
	}
	tally, err := mapWords(m.Tally)
	if err != nil {
		return err
	}
	p, err := newProducer(m.Session, m.Load, m.Mode, smallRing, tally)
	if err != nil {
		return err
	}
	fmt.Println(p.FDs[0])
	if err := p.attach(m.Socket, false); err != nil {
		return err
	}
	go func() {
		for {
			durable, err := p.barrier(patience)
			if err != nil {
				fmt.Fprintln(os.Stderr, "producer: barrier:", err)
				os.Exit(1)
			}
			for lane, n := range durable {
				atomic.StoreUint64(&tally[tallyDurable+lane], n)
			}
		}
	}()
	for {
		if err := p.play(); err != nil {
			return err
		}
	}
}

func mapWords(file string) ([]uint64, error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(tallyWords * 8); err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, tallyWords*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), tallyWords), nil
}

// TestProducerKilled kills real producer processes at any moment, several at once, beside one that lives. What they had been told is durable can be
// read; what they had published is on the books, to the row; and the one that lives loses nothing.
func TestProducerKilled(t *testing.T) {
	random := seeded(t)
	kills := share(3, 100)
	say := newProgress(t)
	var produced, captured, durable uint64
	for done := 0; done < kills; {
		n := min(10, kills-done)
		dir := storeDir(t)
		e := start(t, dir, smallFiles...)
		survivor := newKilledStore(t, random) // its engine is not killed
		survivor.dir = dir
		if err := survivor.attach(e.Control, false); err != nil {
			t.Fatal(err)
		}
		lives := make([]*mortal, n)
		moments := make([]time.Duration, n)
		for i := range lives {
			lives[i] = &mortal{Session: newSession(random), Mode: ring.ModeComplete, Socket: e.Control, Tally: filepath.Join(t.TempDir(), "tally"),
				Load: load{Seed: random.Uint64(), Lanes: 1 + random.IntN(3), Sites: 1 + random.Uint32N(12), Requests: 1 + random.IntN(8), Prompt: 40, Length: 200}}
			moments[i] = time.Duration(random.IntN(1500)) * time.Millisecond
		}
		counts := make([]uint64, n)
		var alive sync.WaitGroup
		slots := make(chan struct{}, 2)
		for i, m := range lives {
			alive.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				count, err := m.liveFor(moments[i])
				if err != nil {
					t.Errorf("kill %d: %v", done+i, err)
				}
				counts[i] = count
				t.Logf("kill %d: after %v, %d rows produced", done+i, moments[i], count)
			})
		}
		alive.Wait()
		survivor.stop.Store(true)
		if err := <-survivor.played; err != nil {
			t.Fatal(err)
		}
		if err := survivor.bye(); err != nil {
			t.Fatalf("the survivor: %v\n%s", err, &e.log)
		}
		e.stop()
		s, err := store.OpenReadOnly(dir)
		if err != nil {
			t.Fatal(err)
		}
		verified(t, s)
		for i, m := range lives {
			p, c, d := m.check(t, s, counts[i])
			produced, captured, durable = produced+p, captured+c, durable+d
		}
		survivor.checkIn(s, true)
		survivor.Close()
		s.Close()
		done += n
		say.say("%d of %d kills, %d rows produced", done, kills, produced)
	}
	t.Logf("%d kills: %d rows produced, %d captured and read, %d of them durable when their producer died", kills, produced, captured, durable)
	figures(t, "soak_producer_kills", count("kills after which everything published was on the books, and everything durable was read", uint64(kills)).For(">= 100", kills >= 100),
		rowsOf("produced", produced), rowsOf("captured and read", captured), rowsOf("of these durable when their producer died", durable))
}

// liveFor runs a producer for a moment after it has made its ring, kills it, and returns how many rows it had published.
func (m *mortal) liveFor(moment time.Duration) (produced uint64, err error) {
	plan, err := json.Marshal(m)
	if err != nil {
		return 0, err
	}
	tally, err := mapWords(m.Tally)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), producerPlan+"="+string(plan))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	var fd int
	if _, err = fmt.Fscan(bufio.NewReader(out), &fd); err != nil {
		cmd.Process.Kill()
		return 0, fmt.Errorf("no ring: %w", err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", cmd.Process.Pid, fd))
	if err == nil {
		defer mem.Close()
		time.Sleep(moment)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err == nil && cmd.ProcessState.ExitCode() >= 0 {
		err = fmt.Errorf("it ended by itself: %v", cmd.ProcessState)
	}
	if err != nil {
		return 0, err
	}
	return publishedBy(tally, mem)
}

// publishedBy completes a dead producer's own count by what it was doing: the record that it was publishing is in its ring, or not.
func publishedBy(tally []uint64, mem *os.File) (uint64, error) {
	if tally[tallyNext] == tally[tallyProduced] {
		return tally[tallyProduced], nil
	}
	var page [4096]byte
	if _, err := mem.ReadAt(page[:], 0); err != nil {
		return 0, err
	}
	var h ring.Header
	h.Decode(page[:])
	slot := h.RecordsOffset + (tally[tallyLane]*uint64(h.RecordCapacity)+tally[tallyIndex]%uint64(h.RecordCapacity))*ring.RecordSize
	var record [ring.RecordSize]byte
	if _, err := mem.ReadAt(record[:], int64(slot)); err != nil {
		return 0, err
	}
	var open ring.OpenRecord
	if open.Decode(record[:]); open.Seq == tally[tallyIndex]+1 {
		return tally[tallyNext], nil
	}
	return tally[tallyProduced], nil
}

// check plays the dead producer's script again, and holds the store against it.
func (m *mortal) check(t *testing.T, s *store.Store, produced uint64) (rows, captured, durable uint64) {
	t.Helper()
	tally, err := mapWords(m.Tally)
	if err != nil {
		t.Fatal(err)
	}
	sessions, err := s.Sessions()
	if err != nil {
		t.Fatal(err)
	}
	number := uint32(0)
	for _, session := range sessions {
		if session.ID == m.Session {
			number = session.Number
		}
	}
	if number == 0 {
		if tally[tallyDurable] > 0 {
			t.Fatalf("session %s is not in the store", m.Session)
		}
		return 0, 0, 0 // killed before it was admitted: nobody saw its ring
	}
	o := newOracle(m.Load.Lanes)
	o.promise(tally[tallyDurable : tallyDurable+m.Load.Lanes])
	script := newScript(m.Load)
	for range tally[tallyClosed] + 1 {
		f := script.next()
		for site, a := range f.actions {
			o.note(f, uint32(site), 0, f.rows, a == capture || a == halves)
		}
	}
	b := booksOf(s, number)
	if b.produced != produced || b.sum != produced {
		t.Errorf("session %s published %d rows; the store says %d, and its books sum to %d", m.Session, produced, b.produced, b.sum)
	}
	for _, l := range s.Books().Lines {
		if l.Session == number && l.Outcome == tensor.Lost && l.Reason != tensor.ProducerExit && l.Reason != tensor.NotFired {
			t.Errorf("session %s: %d rows lost(%v)", m.Session, l.Rows, l.Reason)
		}
	}
	captured, durable = o.check(t, s, number, m.Load.Sites, false)
	return produced, captured, durable
}
