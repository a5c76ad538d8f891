//! A request between whoever asks and the engine's thread.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::event::Event;
use crate::Request;
use crate::prompter::Prompt;

/// Who is told what becomes of a request.
pub(super) type OnEvent = Box<dyn FnMut(Event) + Send>;

/// A request on its way to the engine's thread.
pub(super) struct Job {
    pub(super) prompt: Prompt,
    pub(super) request: Request<'static>,
    pub(super) cancelled: Arc<AtomicBool>,
    pub(super) on_event: OnEvent,
}
