//! Who is still there: each process leaves a sign of life in the store every second, on a thread of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::handle::Handle;
use super::store::Store;
use super::world::World;

const BEAT: Duration = Duration::from_secs(1);

/// A process that leaves no sign for so long is taken for frozen or gone.
const SILENCE: Duration = Duration::from_secs(15);

/// The same once a connection of the network has broken.
const SILENCE_AFTER_A_BREAK: Duration = Duration::from_secs(5);

/// Where NCCL's connections broke and all processes are there after so long, the network is what broke.
const ALL_THERE: Duration = Duration::from_secs(10);

/// Why all are to stop, by whoever knows first.
pub(super) const END: &str = "end";

/// That a connection to somebody broke.
pub(super) const BREAK: &str = "break";

/// What a process that is through leaves as its last sign.
const DONE: &[u8] = b"done";

/// Watches over the others. Rank 0 looks at all, each of the others at rank 0, which tells them of one that is gone.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The key of a rank's sign.
pub(super) fn beat(rank: usize) -> String {
    format!("beat/{rank}")
}

impl Watch {
    /// Starts a thread, with a connection of its own to the store, and one that sees to it that the store answers: a keeper
    /// that is frozen lets whoever asks it wait for ever.
    pub(super) fn start(world: &World, attempt: &str, handle: Arc<Handle>, longest_wait: Duration) -> Result<Self> {
        let store = Store::connect(world, false, SILENCE)?.within(attempt)?;
        let stop = Arc::new(AtomicBool::new(false));
        let watched = if world.rank == 0 { (1..world.world_size).collect() } else { vec![0] };
        let seen = watched.into_iter().map(|rank| (rank, (Vec::new(), Instant::now()))).collect();
        let answered = Arc::new(Mutex::new(Instant::now()));
        let watcher = Watcher { store, world: world.clone(), handle, longest_wait, seen, beats: 0, broke: None };

        let (no_store, handle) = (watcher.no_store(), Arc::clone(&watcher.handle));
        let (stopped, last) = (Arc::clone(&stop), Arc::clone(&answered));
        let see_to_answers = move || {
            while !stopped.load(Ordering::Relaxed) && !handle.is_over() {
                if last.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > SILENCE {
                    handle.abort(&no_store);
                }
                thread::park_timeout(BEAT);
            }
        };
        let stopped = Arc::clone(&stop);
        let watch = move || watcher.run(&stopped, &answered);
        let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.to_owned()).spawn(run).context("cannot start a thread")
        };
        Ok(Self { stop, threads: vec![start("watch", Box::new(watch))?, start("answers", Box::new(see_to_answers))?] })
    }

    /// Says good-bye; nobody misses this process any more.
    pub(super) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let start = Instant::now();
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // One that asks a frozen store comes back with the end of the process.
            while !thread.is_finished() && start.elapsed() < 3 * BEAT {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Whether a rank is through.
pub(super) fn is_done(store: &Store, rank: usize) -> Result<bool> {
    let key = beat(rank);
    Ok(store.has(&key)? && store.get(&key)? == DONE)
}

struct Watcher {
    store: Store,
    world: World,
    handle: Arc<Handle>,
    longest_wait: Duration,
    seen: BTreeMap<usize, (Vec<u8>, Instant)>, // last sign of each that is watched, and when it came
    beats: u64,
    broke: Option<Instant>, // when NCCL's connections were found broken
}

impl Watcher {
    fn run(mut self, stopped: &AtomicBool, answered: &Mutex<Instant>) {
        while !stopped.load(Ordering::Relaxed) {
            match self.look() {
                Ok(None) => *answered.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now(),
                Ok(Some(reason)) => {
                    self.handle.abort(&reason);
                    break;
                }
                Err(_) => return self.handle.abort(&self.no_store()),
            }
            thread::park_timeout(BEAT);
        }
        let _ = self.store.set(&beat(self.world.rank), DONE);
    }

    /// Leaves a sign and looks for those of others: the reason to stop, where there is one.
    fn look(&mut self) -> Result<Option<String>> {
        self.beats += 1;
        let (collectives, step) = self.handle.progress();
        let sign = format!("{} {collectives} {step}", self.beats);
        self.store.set(&beat(self.world.rank), sign.as_bytes())?;
        if self.store.has(END)? {
            return Ok(Some(String::from_utf8_lossy(&self.store.get(END)?).into_owned()));
        }
        if self.broke.is_none() && self.handle.is_broken() {
            self.broke = Some(Instant::now());
            self.store.set(BREAK, b"")?;
        }
        let silence = if self.store.has(BREAK)? { SILENCE_AFTER_A_BREAK } else { SILENCE };
        for (rank, (last, since)) in &mut self.seen {
            let key = beat(*rank);
            let sign = if self.store.has(&key)? { self.store.get(&key)? } else { Vec::new() };
            if sign != *last || sign == DONE {
                (*last, *since) = (sign, Instant::now());
            } else if since.elapsed() > silence {
                let at = String::from_utf8_lossy(last)
                    .rsplit(' ')
                    .next()
                    .map_or(String::new(), |step| format!(" at step {step}"));
                let reason = format!(
                    "rank {rank} has not been heard of for {} s{at}: its process is frozen or gone",
                    silence.as_secs()
                );
                self.store.set(END, reason.as_bytes())?;
                return Ok(Some(reason));
            }
        }
        let reason = if self.handle.waiting() > self.longest_wait {
            self.late()?
        } else if self.broke.is_some_and(|broke| broke.elapsed() > ALL_THERE) {
            format!("rank {}: NCCL's connections broke, NCCL_DEBUG=WARN shows where", self.world.rank)
        } else {
            return Ok(None);
        };
        self.store.set(END, reason.as_bytes())?;
        Ok(Some(reason))
    }

    /// Who has not come to what this process waits in.
    fn late(&self) -> Result<String> {
        let mine = self.handle.progress().0;
        let mut late = Vec::new();
        for rank in (0..self.world.world_size).filter(|rank| *rank != self.world.rank) {
            let sign = self.store.get(&beat(rank))?;
            let sign = String::from_utf8_lossy(&sign).into_owned();
            let collectives: u64 = sign.split(' ').nth(1).and_then(|count| count.parse().ok()).unwrap_or(0);
            if collectives < mine {
                late.push(format!("rank {rank} (at step {})", sign.rsplit(' ').next().unwrap_or_default()));
            }
        }
        let who = if late.is_empty() { "all came, the network is stuck".to_owned() } else { late.join(", ") };
        Ok(format!(
            "rank {} has waited {} s, ddp_timeout, for the others: {who}",
            self.world.rank,
            self.longest_wait.as_secs()
        ))
    }

    fn no_store(&self) -> String {
        let World { master_addr, master_port, has_agent_store, .. } = &self.world;
        let keeper = if *has_agent_store { "torchrun's agent" } else { "rank 0" };
        format!("{keeper}, which keeps the store at {master_addr}:{master_port}, does not answer: it is frozen or gone")
    }
}
