//! A request that the engine has taken.

use tokio::sync::mpsc::UnboundedReceiver;
use vora_infer::{Event, Ticket};

use super::rules::Rules;
use crate::state::InFlight;

/// What comes of a request's choices. Dropped, it takes the request back.
pub(super) struct Running {
    pub(super) events: UnboundedReceiver<(usize, Event)>, // each with its choice
    pub(super) tickets: Vec<Option<Ticket>>,
    pub(super) model: String,
    pub(super) rules: Rules,
    pub(super) pictures: Vec<String>, // the fields that they came by
    pub(super) _in_flight: InFlight,
}
