package control

import (
	"os"
	"strconv"
	"sync"
	"syscall"
)

// niceness of an engine. Where processors are short the model's own threads go first: those that launch its kernels, and those that serve its tokens.
const niceness = 5

var lower = sync.OnceFunc(func() {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil { // of a niceness nothing depends
		return
	}
	for _, task := range tasks { // each thread has one of its own, which those that it starts inherit
		if id, err := strconv.Atoi(task.Name()); err == nil {
			if now, err := syscall.Getpriority(syscall.PRIO_PROCESS, id); err == nil && 20-now < niceness { // the system call gives 20 less it
				_ = syscall.Setpriority(syscall.PRIO_PROCESS, id, niceness)
			}
		}
	}
})

// GiveWay has the threads of this process give way to others where processors are short, from now on. New does it.
func GiveWay() { lower() }
