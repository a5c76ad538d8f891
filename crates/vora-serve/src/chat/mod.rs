//! `/v1/chat/completions`: a body becomes requests to the engine, their events an answer.

mod answer;
mod complete;
mod messages;
mod pictures;
mod rules;
mod running;
mod stream;
mod wire;

pub(crate) use complete::{Answered, complete, prepare_for};
pub(crate) use stream::ChatStream;
