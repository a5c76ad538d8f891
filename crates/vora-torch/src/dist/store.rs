//! Keys and values that all processes reach.

use std::ffi::{CString, c_void};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::world::World;
use crate::ffi::{self, dist};

/// How much longer than its time-out a connection may take to say so.
const LEEWAY: Duration = Duration::from_secs(2);

/// A connection to the store of these processes, over TCP; rank 0 keeps it, or torchrun's agent.
#[derive(Debug)]
pub(super) struct Store(*mut c_void);

// SAFETY: c10d locks a store's connection around every use.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects; `keeps` says whether this process is to keep the store. An answer is waited for as long as `timeout`.
    pub(super) fn connect(world: &World, keeps: bool, timeout: Duration) -> Result<Self> {
        let place = format!("{}:{}", world.master_addr, world.master_port);
        // Another program that listens there would let libtorch wait for its greeting for ever.
        let (sender, receiver) = channel();
        let of_thread = world.clone();
        let open = move || drop(sender.send(open(&of_thread, keeps, timeout)));
        thread::Builder::new().name("store".to_owned()).spawn(open).context("cannot start a thread")?;
        let said = match receiver.recv_timeout(timeout.saturating_add(LEEWAY)) {
            Ok(Ok(store)) => return Ok(store),
            Ok(Err(error)) => error,
            Err(_) => anyhow!("whoever listens there is none of ours"),
        };
        let text = said.to_string();
        Err(if keeps && (text.contains("EADDRINUSE") || text.contains("in use")) {
            let port = world.master_port;
            said.context(format!("port {port} is in use on this machine: choose another MASTER_PORT"))
        } else if keeps {
            said.context(format!("rank 0 cannot keep a store at {place}: MASTER_ADDR is to name its own machine"))
        } else {
            said.context(format!("no store answers at {place}, where MASTER_ADDR and MASTER_PORT say that rank 0 is"))
        })
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = CString::new(key)?;
        // SAFETY: a live store, a string, and as many bytes as are said.
        ffi::check(unsafe { dist::vora_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    pub(super) fn has(&self, key: &str) -> Result<bool> {
        let key = CString::new(key)?;
        // SAFETY: a live store and a string.
        let found = unsafe { dist::vora_store_has(self.0, key.as_ptr()) };
        if found < 0 { Err(ffi::last_error()) } else { Ok(found == 1) }
    }

    /// What is there under a key, which is waited for.
    pub(super) fn get(&self, key: &str) -> Result<Vec<u8>> {
        let key = CString::new(key)?;
        // SAFETY: a live store and a string.
        let bytes = ffi::tensor(unsafe { dist::vora_store_get(self.0, key.as_ptr()) })?;
        Ok(Vec::<u8>::try_from(bytes)?)
    }

    /// The same where the key is there.
    pub(super) fn look(&self, key: &str) -> Result<Option<String>> {
        let found = self.has(key)?.then(|| self.get(key)).transpose()?;
        Ok(found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Puts `desired` under a key where `expected` is, "" for nothing; what is there then.
    pub(super) fn swap(&self, key: &str, expected: &str, desired: &str) -> Result<String> {
        let (key, expected, desired) = (CString::new(key)?, CString::new(expected)?, CString::new(desired)?);
        // SAFETY: a live store and three strings.
        let found = unsafe { dist::vora_store_swap(self.0, key.as_ptr(), expected.as_ptr(), desired.as_ptr()) };
        Ok(String::from_utf8_lossy(&Vec::<u8>::try_from(ffi::tensor(found)?)?).into_owned())
    }

    /// The keys that begin with `name/`, without that.
    pub(super) fn within(&self, name: &str) -> Result<Self> {
        let name = CString::new(name)?;
        // SAFETY: a live store and a string.
        let store = unsafe { dist::vora_store_within(self.0, name.as_ptr()) };
        if store.is_null() { Err(ffi::last_error()) } else { Ok(Self(store)) }
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.0
    }
}

fn open(world: &World, keeps: bool, timeout: Duration) -> Result<Store> {
    let host = CString::new(world.master_addr.as_str()).context("MASTER_ADDR")?;
    let (port, timeout) = (world.master_port, i64::try_from(timeout.as_millis())?);
    // SAFETY: a string that outlives the call.
    let store = unsafe { dist::vora_store_new(host.as_ptr(), port, i32::from(keeps), timeout) };
    if store.is_null() { Err(ffi::last_error()) } else { Ok(Store(store)) }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by `vora_store_new`, freed once.
        unsafe { dist::vora_store_free(self.0) };
    }
}
