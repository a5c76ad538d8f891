//! A process that works when it is told to, so that several can take turns.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

/// A process that says `ready`, takes a turn for each line that it gets, and says in a line of JSON what came of it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Process {
    /// Starts it with one thread, and waits until it is ready. On a GPU one thread starts its kernels.
    ///
    /// # Errors
    /// Where it cannot be run, or ends before it is ready.
    pub fn start(mut command: Command) -> Result<Self> {
        let threads = [("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")];
        let mut child = command
            .envs(threads)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let lines = BufReader::new(child.stdout.take().context("its output")?);
        let mut process = Self { child, lines };
        ensure!(process.line()? == "ready", "a process that is not ready");
        Ok(process)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "a process ended before its turn was over");
        Ok(line.trim().to_owned())
    }

    /// Has it take a turn.
    ///
    /// # Errors
    /// Where it ends, or says something else.
    pub fn ask<T: DeserializeOwned>(&mut self, what: &str) -> Result<T> {
        writeln!(self.child.stdin.as_mut().context("its input")?, "{what}")?;
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("what a process says of its turn: {line}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// User and system time of this process so far.
///
/// # Errors
/// Where the system does not say.
pub fn cpu_seconds() -> Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes into `time`.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    ensure!(read == 0, "the system has no clock of a process's time");
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}
