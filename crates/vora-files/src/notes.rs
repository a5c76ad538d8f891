//! What a user should know once, however often the same folder is opened.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// Tells `note` as a warning of `tracing`, unless this program told the same before; says whether it did.
pub fn tell_once(note: String) -> bool {
    static TOLD: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    let told = told.get_or_insert_default();
    if told.contains(&note) {
        return false;
    }
    tracing::warn!("{note}");
    told.insert(note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_told_once() {
        assert!(tell_once("one folder".into()) && tell_once("another folder".into()));
        assert!(!tell_once("one folder".into()));
    }
}
