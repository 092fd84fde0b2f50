package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// readyPipe is what --ready-fd names. Whoever started this process waits there for a line that says it is ready; or for the pipe's end, and then looks for the reason among what was printed.
// So it is closed once the line is written, or by the end of the process: errors are printed after everything else has returned.
var readyPipe *os.File // held here, because a file that nothing refers to is closed

// openReady takes the descriptor that a command was given.
func openReady(command string, fd int) error {
	file := os.NewFile(uintptr(fd), "ready-fd")
	if _, err := file.Stat(); err != nil {
		return usage(fmt.Errorf("%s: --ready-fd %d: %w", command, fd, err))
	}
	readyPipe = file
	return nil
}

// sayReady writes the line and closes the pipe.
func sayReady(what any) error {
	text, err := json.Marshal(what)
	if err == nil {
		_, err = readyPipe.Write(append(text, '\n'))
	}
	return errors.Join(err, readyPipe.Close())
}
