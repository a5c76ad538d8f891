//! Descriptions of scenes.

use vora_data::scenes::Description;

/// Whether the answer describes what one of those expected describes: the same set of colour, shape and place, in
/// whatever order, with nothing left out and nothing added.
pub fn same_description(answer: &str, references: &[String]) -> bool {
    let told = Description::parse(answer);
    told.is_some() && references.iter().any(|reference| Description::parse(reference) == told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_does_not_matter_and_everything_else_does() {
        let references = ["The picture shows a red ring at the top left and a cross at the bottom left.".to_owned()];
        assert!(same_description(&references[0], &references));
        let turned = "The picture shows a cross at the bottom left and a red ring at the top left.";
        assert!(same_description(turned, &references));
        assert!(!same_description("The picture shows a red ring at the top left.", &references));
        assert!(!same_description("no", &["no".to_owned()]) && !same_description(turned, &[]));
    }
}
