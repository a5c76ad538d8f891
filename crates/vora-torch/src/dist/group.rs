//! Collectives: what all processes of a run do together.

use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Tensor};

use super::handle::Handle;
use super::meeting::meet;
use super::nccl::Nccl;
use super::store::Store;
use super::watch::{BREAK, END, Watch, beat, is_done};
use super::world::World;
use crate::ffi::{self, dist};

/// The time-out of Gloo and NCCL themselves, which nobody waits for: the watch ends what waits too long.
const NO_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long the watch may take to say who is gone, after a connection has broken.
const EXPLANATION: Duration = Duration::from_secs(12);

/// How long the keeper of the store waits for the others to be through with it.
const FAREWELL: Duration = Duration::from_secs(20);

/// How a collective puts values together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

/// Bytes of what this process handed to collectives so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Traffic {
    /// Gradients, summed by the Reducer.
    pub gradients: u64,
    /// Values summed or compared otherwise.
    pub all_reduce: u64,
    /// Sent or received by broadcasts.
    pub broadcast: u64,
    /// Gathered of all processes together.
    pub all_gather: u64,
}

/// The processes that train together. What one of them calls here, all call, in the same order.
///
/// Whoever waits for one that is frozen, gone or has [failed](Self::fail) gets an error that names it, within half a
/// minute; the group is over then.
#[derive(Debug)]
pub struct ProcessGroup {
    world: World,
    watch: Option<Watch>,
    handle: Arc<Handle>,
    store: Store,
    traffic: Mutex<Traffic>,
    waited: Mutex<Duration>,
}

impl ProcessGroup {
    /// Meets the others, for whom it waits as long as `timeout`; none in a collective is waited for longer either.
    ///
    /// # Errors
    /// Names the ranks that did not come, a port that is in use, an address where no store answers, and a rank that is there
    /// twice.
    pub fn join(world: &World, timeout: Duration) -> Result<Arc<Self>> {
        let World { rank, world_size, .. } = *world;
        let store = Store::connect(world, rank == 0 && !world.has_agent_store, timeout)?;
        let attempt = meet(&store, world, timeout)?;
        let store = store.within(&attempt)?;
        store.set(&beat(rank), b"")?;

        let interface = CString::new(std::env::var("GLOO_SOCKET_IFNAME").unwrap_or_default())?;
        let host = CString::new(if world.is_on_one_machine() { world.master_addr.as_str() } else { "" })?;
        let milliseconds = i64::try_from(NO_TIMEOUT.as_millis())?;
        let (rank, world_size) = (i32::try_from(rank)?, i32::try_from(world_size)?);
        // SAFETY: a live store, two strings.
        let group = unsafe {
            dist::vora_group_new(store.as_ptr(), rank, world_size, interface.as_ptr(), host.as_ptr(), milliseconds)
        };
        if group.is_null() {
            return Err(ffi::last_error().context(
                "the processes cannot reach each other over the network; \
                GLOO_SOCKET_IFNAME names the interface to use",
            ));
        }
        let handle = Arc::new(Handle::new(group));
        let watch = Watch::start(world, &attempt, Arc::clone(&handle), timeout)?;
        let (traffic, waited) = Default::default();
        Ok(Arc::new(Self { world: world.clone(), watch: Some(watch), handle, store, traffic, waited }))
    }

    /// Has collectives of tensors on GPUs go through NCCL, in place of Gloo by way of the host; `device` is this process's. All
    /// call it, before any tensor on a GPU goes anywhere. Those of tensors on the host stay with Gloo.
    ///
    /// A collective has then only been queued where it returns. One that another process does not come to is found all the
    /// same, by what waits on the GPU, and the next one of any tensor tells.
    ///
    /// # Errors
    /// In every process: the first one's that is on no GPU, that sees none, or that shares one with another.
    pub fn attach(&self, nccl: &Nccl, device: Device) -> Result<()> {
        let attached = || {
            let Device::Cuda(index) = device else {
                bail!("NCCL sends tensors between GPUs, this process is on {device:?}")
            };
            let (index, timeout) = (i32::try_from(index)?, i64::try_from(NO_TIMEOUT.as_millis())?);
            // SAFETY: a live group and store, and the function that csrc/dist/nccl.h declares.
            ffi::check(unsafe {
                dist::vora_group_attach_nccl(self.as_ptr(), self.store.as_ptr(), nccl.attach, index, timeout)
            })?;
            Ok(index)
        };
        let index = self.agree(attached().with_context(|| format!("NCCL does not serve {device:?}")))?;
        // SAFETY: a live group.
        let connected = self.timed(|| ffi::check(unsafe { dist::vora_group_connect_nccl(self.as_ptr(), index) }));
        self.agree(connected.with_context(|| format!("NCCL does not connect {device:?} of rank {}", self.rank())))
    }

    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.world.rank
    }

    /// How many there are.
    pub fn world_size(&self) -> usize {
        self.world.world_size
    }

    /// Puts the values of all processes together, in place: `[..]`, the same in each.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn all_reduce(&self, tensor: &Tensor, op: Op) -> Result<()> {
        self.count_collective();
        self.count(|traffic| traffic.all_reduce += bytes(tensor));
        let op = match op {
            Op::Sum => 0, // numbers of c10d's ReduceOp
            Op::Max => 4,
        };
        // SAFETY: a live group and tensor.
        self.timed(|| ffi::check(unsafe { dist::vora_group_all_reduce(self.as_ptr(), tensor.as_ptr(), op) }))
    }

    /// Sums of f64 numbers over all processes.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn sum(&self, values: &[f64]) -> Result<Vec<f64>> {
        let tensor = Tensor::from_slice(values);
        self.all_reduce(&tensor, Op::Sum)?;
        Ok(Vec::try_from(tensor)?)
    }

    /// Whether it is so in any of the processes.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn any(&self, is_so: bool) -> Result<bool> {
        let tensor = Tensor::from_slice(&[i64::from(is_so)]);
        self.all_reduce(&tensor, Op::Max)?;
        Ok(tensor.int64_value(&[0]) > 0)
    }

    /// Takes over what `root` has there: `[..]`, the same shape in each process.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<()> {
        self.count_collective();
        self.count(|traffic| traffic.broadcast += bytes(tensor));
        let root = i32::try_from(root)?;
        // SAFETY: a live group and tensor.
        self.timed(|| ffi::check(unsafe { dist::vora_group_broadcast(self.as_ptr(), tensor.as_ptr(), root) }))
    }

    /// `[..]` of every process -> `[world_size, ..]`.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.all_gather_each(&[tensor.shallow_clone()])?.pop().context("one was asked for")
    }

    /// The same of several tensors, side by side.
    ///
    /// # Errors
    /// As [`Self::all_gather`].
    pub fn all_gather_each(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        self.count_collective();
        self.count(|traffic| traffic.all_gather += tensors.iter().map(bytes).sum::<u64>() * self.world_size() as u64);
        let (pointers, mut gathered) = (ffi::pointers(tensors), vec![std::ptr::null_mut(); tensors.len()]);
        let (from, to) = (pointers.as_ptr(), gathered.as_mut_ptr());
        // SAFETY: a live group, live tensors, and room for as many.
        self.timed(|| ffi::check(unsafe { dist::vora_group_all_gather(self.as_ptr(), from, tensors.len(), to) }))?;
        gathered.into_iter().map(ffi::tensor).collect()
    }

    /// What each process has to say, by rank.
    ///
    /// # Errors
    /// As [`Self::all_gather`].
    pub fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let lens = Vec::<i64>::try_from(self.all_gather(&Tensor::from_slice(&[mine.len() as i64]))?.flatten(0, -1))?;
        let longest = usize::try_from(lens.iter().copied().max().unwrap_or(0))?;
        if longest == 0 {
            return Ok(vec![Vec::new(); lens.len()]);
        }
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let all = Vec::<u8>::try_from(self.all_gather(&Tensor::from_slice(&padded))?.flatten(0, -1))?;
        Ok(all.chunks(longest).zip(lens).map(|(bytes, len)| bytes[..len as usize].to_vec()).collect())
    }

    /// What rank 0 has to say, in every process.
    ///
    /// # Errors
    /// As [`Self::broadcast`].
    pub fn broadcast_bytes(&self, of_first: &[u8]) -> Result<Vec<u8>> {
        let len = Tensor::from_slice(&[of_first.len() as i64]);
        self.broadcast(&len, 0)?;
        let mut bytes = if self.rank() == 0 { of_first.to_vec() } else { Vec::new() };
        bytes.resize(usize::try_from(len.int64_value(&[0]))?, 0);
        if bytes.is_empty() {
            return Ok(bytes);
        }
        let tensor = Tensor::from_slice(&bytes);
        self.broadcast(&tensor, 0)?;
        Ok(Vec::try_from(tensor)?)
    }

    /// Waits until all are here.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn barrier(&self) -> Result<()> {
        self.any(false).map(|_| ())
    }

    /// What this process found, where all found something; where one failed, its error in each.
    ///
    /// # Errors
    /// The own one, or that of the first rank that has one.
    pub fn agree<T>(&self, found: Result<T>) -> Result<T> {
        let said = found.as_ref().err().map_or(String::new(), |error| format!("{error:#}"));
        let all = self.all_gather_bytes(said.as_bytes())?;
        let found = found?;
        match all.iter().enumerate().find(|(_, said)| !said.is_empty()) {
            Some((rank, said)) => bail!("rank {rank}: {}", String::from_utf8_lossy(said)),
            None => Ok(found),
        }
    }

    /// Tells the others that this process ends with `error`: whatever they wait in ends, with it as the reason.
    pub fn fail(&self, error: &anyhow::Error) {
        if !self.is_over() {
            let reason = format!("rank {}: {error:#}", self.rank());
            let _ = self.store.set(END, reason.as_bytes());
            self.handle.abort(&reason);
        }
    }

    /// Leaves word which step of the run this process is at, to be told should it get no further.
    pub fn note_step(&self, step: u64) {
        self.handle.note_step(step);
    }

    /// What was handed to collectives so far.
    pub fn traffic(&self) -> Traffic {
        let traffic = *self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a live group.
        Traffic { gradients: unsafe { dist::vora_group_reduced(self.as_ptr()) }, ..traffic }
    }

    /// How long this process has waited in collectives so far, for the others and for the network; not what goes on beside a
    /// backward pass.
    pub fn waited(&self) -> Duration {
        *self.waited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.handle.group
    }

    pub(super) fn is_over(&self) -> bool {
        self.handle.is_over()
    }

    pub(super) fn count_collective(&self) {
        self.handle.count_collective();
    }

    /// What `wait` waits for, the time taken; an error of it is explained.
    pub(super) fn timed<T>(&self, wait: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let found = wait();
        *self.waited.lock().unwrap_or_else(PoisonError::into_inner) += start.elapsed();
        self.explained(found)
    }

    fn count(&self, add: impl FnOnce(&mut Traffic)) {
        add(&mut self.traffic.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn explained<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| self.explain(error))
    }

    /// What is behind an error that something on the way of collectives ended with, a backward pass for one: an error of the
    /// network says which address it was at, and soon it is known which rank. Other errors come back as they are.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let said = format!("{error:#}");
        let said = said.lines().next().unwrap_or_default();
        if !self.is_over() && ["onnection", "peer", "socket", "imed out"].iter().any(|word| said.contains(word)) {
            let _ = self.store.set(BREAK, b"");
            let start = Instant::now();
            while !self.is_over() && start.elapsed() < EXPLANATION {
                thread::sleep(Duration::from_millis(50));
            }
        }
        self.handle.reason().map_or(error, |reason| anyhow!(reason))
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(mut watch) = self.watch.take() {
            watch.stop();
        }
        let keeps_store = self.world.rank == 0 && !self.world.has_agent_store;
        let start = Instant::now();
        let mut left: Vec<usize> = if keeps_store { (1..self.world.world_size).collect() } else { Vec::new() };
        // The others still read there why they are to stop, or that they may; one that is gone never does.
        let patience = if self.is_over() { FAREWELL / 4 } else { FAREWELL };
        while !left.is_empty() && start.elapsed() < patience {
            left.retain(|rank| !is_done(&self.store, *rank).unwrap_or(true));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
