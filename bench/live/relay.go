//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The floor of this machine: processes that wake each other as producer, engine and subscriber do, in between or not the pump and the engine again, and do nothing
// else.

// relayBytes is what a frame of /v1/live/tensors comes to.
const relayBytes = 8 + 250 + width

// relay is the engine's part: woken by the producer, it wakes the pump; woken by that, it writes a frame; without a pump, at once. Its descriptors: doorbell,
// pump's doorbell, subscriber.
func relay(pumped bool) error {
	runtime.LockOSThread()
	frame := make([]byte, relayBytes)
	turns := []func() error{func() error { _, err := unix.Write(5, frame); return err }}
	if pumped {
		turns = append([]func() error{func() error { return toll(4) }}, turns...)
	}
	for {
		for _, to := range turns {
			if err := heard(3); err != nil {
				return err
			}
			if err := to(); err != nil {
				return err
			}
		}
	}
}

func toll(fd int) error {
	var one [8]byte
	binary.LittleEndian.PutUint64(one[:], 1)
	_, err := unix.Write(fd, one[:])
	return err
}

func heard(fd int) error {
	var count [8]byte
	for {
		if _, err := unix.Read(fd, count[:]); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// floor measures it. command starts this program on the processors where an engine would run.
func floor(command []string, pumped bool, steps int, pace time.Duration) (took []float64, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for range 2 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return nil, err
		}
		files = append(files, os.NewFile(uintptr(fd), "eventfd"))
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	files = append(files, os.NewFile(uintptr(pair[0]), "relay"))
	ours := os.NewFile(uintptr(pair[1]), "subscriber")
	in, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	doorbell, pump := int(files[0].Fd()), int(files[1].Fd()) // Fd makes them blocking
	self := exec.Command(command[0], append(command[1:], "-relay", map[bool]string{true: "pumped", false: "direct"}[pumped])...)
	self.ExtraFiles, self.Stderr = files, os.Stderr
	if err := self.Start(); err != nil {
		return nil, err
	}
	stop := make(chan struct{})
	pumpEnded := make(chan struct{})
	go func() {
		defer close(pumpEnded)
		runtime.LockOSThread()
		for heard(pump) == nil {
			select {
			case <-stop:
				return
			default:
			}
			if toll(doorbell) != nil {
				return
			}
		}
	}()
	defer func() {
		self.Process.Kill()
		self.Wait()
		close(stop)
		toll(pump)
		<-pumpEnded
	}()
	arrived := make(chan time.Time, 1)
	go func() {
		frame := make([]byte, relayBytes)
		for {
			if _, err := io.ReadFull(in, frame); err != nil {
				return
			}
			arrived <- time.Now()
		}
	}()
	time.Sleep(200 * time.Millisecond)
	for step := range warmUp + steps {
		at := time.Now()
		if err := toll(doorbell); err != nil {
			return nil, err
		}
		select {
		case then := <-arrived:
			if step >= warmUp {
				took = append(took, float64(then.Sub(at).Nanoseconds())/1e3)
			}
		case <-time.After(10 * time.Second):
			return nil, fmt.Errorf("relay: step %d did not arrive within 10 s", step)
		}
		time.Sleep(time.Until(at.Add(pace)))
	}
	return took, nil
}
