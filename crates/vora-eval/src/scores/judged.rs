//! Whether an answer is the expected one, by what its question is about.

use vora_data::scenes::QuestionKind;
use vora_image::BoundingBox;

use super::{exact_match, same_description};

/// Whether the answer is one of those expected: in its words, but for a description by what it tells, and for a box by how
/// much of the expected one it covers.
pub fn is_right(kind: Option<&str>, answer: &str, references: &[String]) -> bool {
    match kind {
        Some(kind) if kind == QuestionKind::Describe.name() => same_description(answer, references),
        Some(kind) if kind == QuestionKind::Box.name() => {
            references.iter().any(|reference| BoundingBox::same_in(answer, reference))
        }
        _ => exact_match(answer, references),
    }
}

/// Whether questions of this type have many right answers, of which the data write down one.
pub(crate) fn has_many_right(kind: &str) -> bool {
    [QuestionKind::Describe, QuestionKind::Box].iter().any(|other| other.name() == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_judged_by_what_it_is_about() {
        let right = |kind: &str, answer: &str, expected: &str| is_right(Some(kind), answer, &[expected.to_owned()]);
        assert!(right("colour", "red", "red") && !right("colour", "blue", "red"));
        let [whole, half, corner] =
            ["(0,0),(1000,1000)", "(0,0),(500,1000)", "(0,0),(99,99)"].map(|corners| format!("<box>{corners}</box>"));
        assert!(right("box", &half, &whole) && !right("box", &corner, &whole) && !right("colour", &half, &whole));
        assert!(!right("box", "<box>(0,0),(1200,1000)</box>", &whole) && !right("box", "left", &whole));
        assert!(has_many_right("box") && has_many_right("describe") && !has_many_right("colour"));
    }
}
