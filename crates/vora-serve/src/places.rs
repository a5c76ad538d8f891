//! As many connections as may be open, and which of them goes where all are: the one that has waited longest for its client.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

/// The places of all connections.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    table: Mutex<Table>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    open: usize,
    now: u64,
    waiting: BTreeMap<u64, Arc<Notify>>, // connections that wait for their clients, by when that began
}

/// One connection's.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    waiting_since: AtomicU64, // 0 while there is a request of its to be answered; read and written with the table
    given_up: Arc<Notify>,
}

impl Places {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), table: Mutex::default(), freed: Notify::new() })
    }

    /// Connections that are open.
    pub(crate) fn open(&self) -> usize {
        self.table().open
    }

    /// A place for a connection, whose client is waited for. Where there is none left, whoever waits longest gives up its own; where
    /// all have requests to answer, one of these has to end first.
    pub(crate) async fn take(self: &Arc<Self>) -> Place {
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(place) = self.try_take() {
                return place;
            }
            freed.await;
        }
    }

    fn try_take(self: &Arc<Self>) -> Option<Place> {
        let mut table = self.table();
        if table.open < self.most {
            table.open += 1;
        } else {
            table.waiting.pop_first()?.1.notify_one();
        }
        let place = Place { places: self.clone(), waiting_since: AtomicU64::new(0), given_up: Arc::default() };
        table.wait(&place);
        Some(place)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Table {
    fn wait(&mut self, place: &Place) {
        self.now += 1;
        self.waiting.insert(self.now, place.given_up.clone());
        place.waiting_since.store(self.now, Ordering::Relaxed);
    }
}

impl Place {
    /// Returns once somebody else has the place: the connection is to be closed.
    pub(crate) async fn given_up(&self) {
        self.given_up.notified().await;
    }

    /// Notes that the client has said all of a request, which keeps it its place.
    pub(crate) fn works(&self) {
        let mut table = self.places.table();
        if table.waiting.remove(&self.waiting_since.load(Ordering::Relaxed)).is_some() {
            self.waiting_since.store(0, Ordering::Relaxed);
        }
    }

    /// Notes that the client has its answer, and may ask again.
    pub(crate) fn waits(&self) {
        let mut table = self.places.table();
        if self.waiting_since.load(Ordering::Relaxed) == 0 {
            table.wait(self);
            drop(table);
            self.places.freed.notify_one(); // whoever found no place may have this one
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.places.table();
        let since = *self.waiting_since.get_mut();
        if since == 0 || table.waiting.remove(&since).is_some() {
            table.open -= 1;
            drop(table);
            self.places.freed.notify_one();
        }
    }
}
