//! `vora train --nproc N`: N processes on this machine with the environment of `torchrun`, without Python.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use vora_torch::runtime;

/// The option that a process started here does not get.
const OPTION: &str = "--nproc";

/// How long the others may take to find by themselves that one is gone, and to say so.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long after that a process that was asked to end may take.
const GRACE: Duration = Duration::from_secs(5);

/// Lines of a process that are told again where it failed.
const LAST_LINES: usize = 5;

/// A process, and the last that it said.
struct Rank {
    child: Child,
    said: Arc<Mutex<VecDeque<String>>>,
    ended: Option<ExitStatus>,
}

/// Starts the processes, hands signals on, and waits until all have ended. One that fails takes the others with it.
pub(crate) fn launch(nproc: usize) -> Result<ExitCode> {
    ensure!(nproc > 0, "{OPTION} is 0, it must be at least 1");
    ensure!(
        std::env::var_os("RANK").is_none(),
        "{OPTION} starts processes, and this one is itself one of some that torchrun or another program started: leave \
         {OPTION} out"
    );
    let counts = [SIGINT, SIGTERM, SIGUSR1].map(|signal| (signal, Arc::new(AtomicUsize::new(0))));
    for (signal, count) in &counts {
        let count = Arc::clone(count);
        // SAFETY: the handler only adds to an atomic.
        unsafe {
            signal_hook::low_level::register(*signal, move || {
                count.fetch_add(1, Ordering::Relaxed);
            })?
        };
    }
    let mut ranks = start(nproc)?;
    let (mut failed, mut asked): (Option<(usize, Instant)>, bool) = (None, false);
    while ranks.iter().any(|rank| rank.ended.is_none()) {
        for (signal, count) in &counts {
            for _ in 0..count.swap(0, Ordering::Relaxed) {
                // A checkpoint that one process is asked for is made by all.
                let told = if *signal == SIGUSR1 { 1 } else { nproc };
                ranks.iter().take(told).for_each(|rank| rank.send(*signal));
            }
        }
        for (number, rank) in ranks.iter_mut().enumerate().filter(|(_, rank)| rank.ended.is_none()) {
            rank.ended = rank.child.try_wait()?;
            if rank.ended.is_some_and(|status| !status.success()) {
                failed.get_or_insert((number, Instant::now()));
            }
        }
        if let Some((_, since)) = failed {
            let left = ranks.iter().filter(|rank| rank.ended.is_none());
            if since.elapsed() > PATIENCE + GRACE {
                left.for_each(|rank| rank.send(SIGKILL));
            } else if since.elapsed() > PATIENCE && !asked {
                left.for_each(|rank| rank.send(SIGTERM));
                asked = true;
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    let code = |rank: &Rank| rank.ended.and_then(|status| status.code());
    match failed {
        None => Ok(ExitCode::SUCCESS),
        // All stopped as they were told to.
        Some(_)
            if [128 + SIGINT, 128 + SIGTERM].iter().any(|stopped| ranks.iter().all(|r| code(r) == Some(*stopped))) =>
        {
            Ok(ExitCode::from(u8::try_from(code(&ranks[0]).unwrap_or(1)).unwrap_or(1)))
        }
        Some((number, _)) => {
            tell(number, &ranks[number]);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn start(nproc: usize) -> Result<Vec<Rank>> {
    let program = std::env::current_exe().context("which program this is")?;
    let args = without_option(std::env::args_os().skip(1));
    // The rest of the processes is told of it at once; nobody listens there a moment ago.
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context("a free port")?.port();
    let threads = std::env::var("OMP_NUM_THREADS").unwrap_or_else(|_| (runtime::threads() / nproc).max(1).to_string());
    let mut ranks = Vec::new();
    for rank in 0..nproc {
        let mut command = Command::new(&program);
        command.args(&args).env("OMP_NUM_THREADS", &threads);
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", nproc), ("LOCAL_WORLD_SIZE", nproc)]
        {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        // A terminal sends its signals to a group: they come from here alone, once each.
        command.process_group(0);
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        let parent = std::process::id();
        // SAFETY: two system calls between fork and exec.
        unsafe { command.pre_exec(move || end_with(parent)) };
        let mut child = command.spawn().context("cannot start a process of the training")?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            let said = Arc::clone(&said);
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(std::io::Result::ok) {
                    let _ = writeln!(std::io::stderr(), "rank {rank}: {line}");
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    said.push_back(line);
                    if said.len() > LAST_LINES {
                        said.pop_front();
                    }
                }
            });
        }
        ranks.push(Rank { child, said, ended: None });
    }
    Ok(ranks)
}

/// A process ends with the one that started it, should that be killed.
fn end_with(parent: u32) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    // SAFETY: system calls without memory.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        if u32::try_from(libc::getppid()) != Ok(parent) {
            return Err(std::io::Error::from(std::io::ErrorKind::NotConnected));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parent;
    Ok(())
}

impl Rank {
    fn send(&self, signal: i32) {
        if self.ended.is_none()
            && let Ok(id) = i32::try_from(self.child.id())
        {
            // SAFETY: a signal to a child that has not been waited for.
            unsafe { libc::kill(id, signal) };
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How the first process that failed ended, and what it said last; rank 0 has said it on this terminal.
fn tell(number: usize, rank: &Rank) {
    let how = rank.ended.map_or("is gone".to_owned(), |status| match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => status.to_string(),
    });
    let said = rank.said.lock().unwrap_or_else(PoisonError::into_inner);
    let last = if said.is_empty() { String::new() } else { "; the last that it said:".to_owned() };
    let lines: String = said.iter().map(|line| format!("\n  {line}")).collect();
    let _ = writeln!(std::io::stderr(), "error: rank {number} (process {}) {how}{last}{lines}", rank.child.id());
}

/// The arguments less the option and its number.
fn without_option(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        if arg == OPTION {
            args.next();
        } else if !arg.to_string_lossy().starts_with("--nproc=") {
            kept.push(arg);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_do_not_get_the_option() {
        let kept = |args: &[&str]| without_option(args.iter().map(OsString::from));
        assert_eq!(kept(&["train", "--nproc", "2", "--config", "a"]), ["train", "--config", "a"]);
        assert_eq!(kept(&["train", "--nproc=2", "--resume"]), ["train", "--resume"]);
    }
}
