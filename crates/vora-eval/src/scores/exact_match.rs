//! Exact match.

/// Whether the answer is one of those expected, letter for letter but for space around it.
///
/// The mean of it over a set is `exact_match` of Hugging Face's `evaluate`.
pub fn exact_match(answer: &str, references: &[String]) -> bool {
    references.iter().any(|reference| reference.trim() == answer.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_the_expected_answers_is_enough() {
        let references = ["top left".to_owned(), "red ".to_owned()];
        assert!(exact_match(" red\n", &references) && exact_match("top left", &references));
        assert!(!exact_match("Red", &references) && !exact_match("top  left", &references));
        assert!(!exact_match("", &references) && !exact_match("red", &[]));
    }
}
