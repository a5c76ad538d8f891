//! An answer as server-sent events, each whole, the last `data: [DONE]`.

use std::fmt::{self, Write};
use std::task::{Context, Poll};

use hyper::body::Bytes;
use serde_json::{Value, json};
use vora_infer::Event;

use super::answer::{Head, Usage, finish_reason, logprob, logprobs};
use super::running::Running;
use crate::error::ApiError;

/// What a piece of the stream holds at most before it goes out.
const PIECE: usize = 64 << 10;

/// A running answer on its way to the client. Dropped, it takes the request back.
pub(crate) struct ChatStream {
    running: Running,
    head: Head,
    usage: Usage,
    open: usize, // choices that go on
    first: Option<(usize, Event)>,
    ended: bool,
}

impl fmt::Debug for ChatStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatStream").field("head", &self.head).field("open", &self.open).finish_non_exhaustive()
    }
}

impl ChatStream {
    /// A stream that begins with `first`.
    pub(super) fn new(running: Running, first: (usize, Event)) -> Self {
        let (head, open) = (Head::new(&running.model), running.rules.n);
        Self { running, head, usage: Usage::default(), open, first: Some(first), ended: false }
    }

    /// All that is there to be sent, in one piece; none after the last.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut piece = String::new();
        while !self.ended && piece.len() < PIECE {
            let next = match self.first.take() {
                Some(first) => Some(first),
                None => match self.running.events.poll_recv(cx) {
                    Poll::Ready(next) => next,
                    Poll::Pending if piece.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                },
            };
            match next {
                Some((choice, event)) => self.write(&mut piece, choice, event),
                None => self.fail(&mut piece, &ApiError::failed()),
            }
        }
        Poll::Ready((!piece.is_empty()).then(|| piece.into()))
    }

    fn write(&mut self, piece: &mut String, choice: usize, event: Event) {
        match event {
            Event::Started { prompt_tokens, cached_tokens, .. } => {
                self.usage.started(prompt_tokens, cached_tokens, choice);
                self.chunk(piece, choice, json!({"role": "assistant", "content": ""}), Vec::new(), None);
            }
            Event::Text { text, tokens } => {
                self.chunk(piece, choice, json!({"content": text}), tokens.iter().map(logprob).collect(), None);
            }
            Event::Finished { reason, completion_tokens } => {
                self.usage.finished(completion_tokens);
                self.chunk(piece, choice, json!({}), Vec::new(), Some(finish_reason(reason)));
                self.running.tickets[choice] = None;
                self.open -= 1;
                if self.open == 0 {
                    self.end(piece);
                }
            }
            Event::Failed(error) => self.fail(piece, &ApiError::of_engine(&error, &self.running.pictures)),
            _ => {}
        }
    }

    fn chunk(&self, piece: &mut String, choice: usize, delta: Value, tokens: Vec<Value>, reason: Option<&str>) {
        let logprobs = (!tokens.is_empty()).then(|| logprobs(tokens));
        let choice = json!({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        let mut chunk = self.head.json("chat.completion.chunk", json!([choice]));
        if self.running.rules.include_usage {
            chunk["usage"] = Value::Null;
        }
        put(piece, &chunk);
    }

    fn end(&mut self, piece: &mut String) {
        if self.running.rules.include_usage {
            let mut chunk = self.head.json("chat.completion.chunk", json!([]));
            chunk["usage"] = self.usage.json();
            put(piece, &chunk);
        }
        piece.push_str("data: [DONE]\n\n");
        self.ended = true;
    }

    /// An error after the beginning: its own event, and the end.
    fn fail(&mut self, piece: &mut String, error: &ApiError) {
        put(piece, &error.json());
        self.running.tickets.clear();
        piece.push_str("data: [DONE]\n\n");
        self.ended = true;
    }
}

fn put(piece: &mut String, event: &Value) {
    let _ = write!(piece, "data: {event}\n\n"); // into memory, which takes it
}
