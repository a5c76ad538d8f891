//! Texts that end an answer, wherever tokens begin and end in them.

/// An answer's text on its way out, held back where one of these texts may have begun.
#[derive(Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty ones end nothing.
    pub(super) fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes new text; what may go out of it and what came before, and whether the answer ends there.
    pub(super) fn push(&mut self, new: &str) -> (String, bool) {
        self.held.push_str(new);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (self.rest(), true);
        }
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let at = self.held.char_indices().map(|(at, _)| at).filter(|&at| at >= from).find(begins);
        let held = self.held.split_off(at.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What is held back still, once no more text comes.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushed piece by piece: what came out, and whether it was ended.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut stops = StopStrings::new(&stops.iter().map(|stop| (*stop).to_owned()).collect::<Vec<_>>());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, ended) = stops.push(piece);
            out.push(text);
            if ended {
                return (out, true);
            }
        }
        out.push(stops.rest());
        (out, false)
    }

    #[test]
    fn text_is_held_back_only_where_a_stop_may_begin() {
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
        assert_eq!(run(&["END"], &["xE", "N", "Dy"]), (vec!["x".into(), String::new(), String::new()], true));
        assert_eq!(run(&["END"], &["xE", "Ny"]), (vec!["x".into(), "ENy".into(), String::new()], false));
        assert_eq!(run(&["END"], &["xEN"]), (vec!["x".into(), "EN".into()], false));
        assert_eq!(run(&["", "\n\n", "b"], &["a\n", "b"]), (vec!["a".into(), "\n".into()], true), "the first of them");
        assert_eq!(run(&["aab"], &["aa", "ab!"]), (vec![String::new(), "a".into()], true));
        assert_eq!(run(&["é!"], &["é", "é", "!"]).0, [String::new(), "é".into(), String::new()]);
    }
}
