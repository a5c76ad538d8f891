//! Who has which page of the cache, and which pages still hold what a prompt may begin with.

use std::collections::{BTreeMap, HashMap};

use super::prefix::PageKey;

/// The pages of a cache of keys and values. A page that nobody holds keeps what it has until it is needed, and is found by its
/// key until then.
#[derive(Debug)]
pub(super) struct Pool {
    free: Vec<i32>,
    pages: Vec<Page>,
    by_key: HashMap<PageKey, i32>,
    idle: BTreeMap<u64, i32>, // pages with a key that nobody holds, the one that was let go first first
    now: u64,
}

#[derive(Debug, Clone, Default)]
struct Page {
    holders: u32,
    key: Option<PageKey>,
    idle_since: u64,
}

impl Pool {
    pub(super) fn new(pages: i32) -> Self {
        Self {
            free: (0..pages).rev().collect(),
            pages: vec![Page::default(); pages as usize],
            by_key: HashMap::new(),
            idle: BTreeMap::new(),
            now: 0,
        }
    }

    /// Pages that somebody holds.
    pub(super) fn used(&self) -> usize {
        self.pages.len() - self.free.len() - self.idle.len()
    }

    /// Holds the pages of the first of these keys, as far as they are there without a gap.
    pub(super) fn hold_known(&mut self, keys: &[PageKey]) -> Vec<i32> {
        let known: Vec<i32> = keys.iter().map_while(|key| self.by_key.get(key).copied()).collect();
        for &page in &known {
            let state = &mut self.pages[page as usize];
            if state.holders == 0 {
                self.idle.remove(&state.idle_since);
            }
            state.holders += 1;
        }
        known
    }

    /// Takes that many pages more; none where there are not as many.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<i32>> {
        (count <= self.free.len() + self.idle.len()).then(|| (0..count).map(|_| self.take_one()).collect())
    }

    fn take_one(&mut self) -> i32 {
        let page = self.free.pop().unwrap_or_else(|| {
            let (_, page) = self.idle.pop_first().expect("as many were counted");
            page
        });
        let state = &mut self.pages[page as usize];
        if let Some(key) = state.key.take() {
            self.by_key.remove(&key);
        }
        state.holders = 1;
        page
    }

    /// Lets others find the page by that key; of two pages of one key the first is found.
    pub(super) fn name(&mut self, page: i32, key: PageKey) {
        let state = &mut self.pages[page as usize];
        if state.key.is_none() && !self.by_key.contains_key(&key) {
            state.key = Some(key);
            self.by_key.insert(key, page);
        }
    }

    /// Lets go of the pages of a sequence, in its order: the last ones are the first that are taken for something else.
    pub(super) fn release(&mut self, pages: &[i32]) {
        for &page in pages.iter().rev() {
            let state = &mut self.pages[page as usize];
            state.holders -= 1;
            if state.holders > 0 {
                continue;
            }
            if state.key.is_none() {
                self.free.push(page);
            } else {
                self.now += 1;
                state.idle_since = self.now;
                self.idle.insert(self.now, page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> PageKey {
        PageKey([n, n])
    }

    #[test]
    fn pages_are_shared_kept_and_taken_in_order() {
        let mut pool = Pool::new(4);
        let first = pool.take(3).unwrap();
        for (i, &page) in first.iter().enumerate().take(2) {
            pool.name(page, key(i as u64));
        }
        assert!(pool.take(2).is_none());
        assert_eq!(pool.used(), 3);
        // Two sequences have the first two pages, one of them the third.
        assert_eq!(pool.hold_known(&[key(0), key(1), key(2)]), first[..2]);
        pool.release(&first);
        assert_eq!(pool.used(), 2);
        pool.release(&first[..2]);
        assert_eq!((pool.used(), pool.hold_known(&[key(1)])), (0, vec![first[1]]));
        pool.release(&first[1..2]);
        // What holds nothing goes first, then what was let go first; a beginning outlives what comes after it.
        assert!(pool.take(2).unwrap().iter().all(|page| !first[..2].contains(page)));
        assert_eq!(pool.take(1).unwrap(), [first[0]]);
        assert_eq!(pool.hold_known(&[key(0)]), [] as [i32; 0]);
        assert_eq!(pool.hold_known(&[key(1)]), [first[1]]);
        assert!(pool.take(1).is_none());
    }

    #[test]
    fn a_key_is_found_once() {
        let mut pool = Pool::new(2);
        let pages = pool.take(2).unwrap();
        pool.name(pages[0], key(1));
        pool.name(pages[1], key(1));
        pool.release(&pages);
        assert_eq!(pool.hold_known(&[key(1), key(1)]), [pages[0], pages[0]]);
        assert_eq!(pool.take(1).unwrap(), [pages[1]]);
    }
}
