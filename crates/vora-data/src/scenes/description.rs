//! A scene in one sentence, and such sentences read back.

use std::collections::BTreeSet;
use std::fmt;

use super::colour::Colour;
use super::scene::{Quarter, Scene};
use super::shape::Shape;

/// What every description begins with.
const OPENING: &str = "The picture shows";

/// What a sentence tells of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Described {
    quarter: Quarter, // first, so that objects are in order from top left to bottom right
    shape: Shape,
    colour: Option<Colour>,
}

/// What a sentence tells of a scene: the colour, shape and place of every object, as a set. A colour that has no name is
/// not told.
///
/// Its text is one sentence of one form, from top left to bottom right: "The picture shows a red ring at the top left, an
/// orange star at the top right and a cross at the bottom left."
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    objects: BTreeSet<Described>,
}

impl Description {
    /// What is right to say of a scene.
    pub fn of(scene: &Scene) -> Self {
        let objects = scene.objects.iter();
        Self { objects: objects.map(|o| Described { quarter: o.quarter, shape: o.shape, colour: o.colour }).collect() }
    }

    /// What a sentence of this form tells, whatever the order of its objects; none where it has another form, or tells
    /// the same twice. Capitals, the comma before "and" and the period at the end are of no account.
    pub fn parse(sentence: &str) -> Option<Self> {
        let sentence = sentence.trim().to_lowercase();
        let list = sentence.strip_prefix(&OPENING.to_lowercase())?;
        let list = list.strip_suffix('.').unwrap_or(list).replace(", and ", ", ").replace(" and ", ", ");
        let mut objects = BTreeSet::new();
        for phrase in list.split(", ") {
            objects.insert(Described::parse(phrase)?).then_some(())?;
        }
        Some(Self { objects })
    }

    /// How many objects both tell of in the same words.
    #[cfg(test)]
    pub(super) fn num_shared(&self, other: &Self) -> usize {
        self.objects.intersection(&other.objects).count()
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(OPENING)?;
        for (idx, object) in self.objects.iter().enumerate() {
            let before = match idx {
                0 => "",
                _ if idx + 1 == self.objects.len() => " and",
                _ => ",",
            };
            write!(f, "{before} {object}")?;
        }
        f.write_str(".")
    }
}

impl Described {
    /// Reads "a red ring at the top left".
    fn parse(phrase: &str) -> Option<Self> {
        let words: Vec<&str> = phrase.split_whitespace().collect();
        let (colour, shape, place) = match words[..] {
            ["a" | "an", shape, "at", "the", row, column] => (None, shape, [row, column]),
            ["a" | "an", colour, shape, "at", "the", row, column] => (Some(colour), shape, [row, column]),
            _ => return None,
        };
        let colour = match colour {
            Some(name) => Some(Colour::ALL.into_iter().find(|colour| colour.name() == name)?),
            None => None,
        };
        let quarter = Quarter::ALL.into_iter().find(|quarter| quarter.name() == place.join(" "))?;
        Some(Self { quarter, shape: Shape::ALL.into_iter().find(|known| known.name() == shape)?, colour })
    }
}

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let colour = self.colour.map(|colour| format!("{} ", colour.name())).unwrap_or_default();
        let noun = format!("{colour}{}", self.shape.name());
        let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        write!(f, "{article} {noun} at the {}", self.quarter.name())
    }
}

#[cfg(test)]
mod tests {
    use super::super::draw::{Draw, Purpose};
    use super::super::{Scenes, ScenesConfig, Split};
    use super::*;

    fn told(objects: &[(Option<Colour>, Shape, Quarter)]) -> Description {
        let objects = objects.iter();
        Description { objects: objects.map(|&(colour, shape, quarter)| Described { quarter, shape, colour }).collect() }
    }

    #[test]
    fn one_form_tells_one_two_and_three_objects_in_order() {
        let ring = (Some(Colour::Red), Shape::Ring, Quarter::TopLeft);
        let star = (Some(Colour::Orange), Shape::Star, Quarter::TopRight);
        let cross = (None, Shape::Cross, Quarter::BottomLeft);
        let says = |objects: &[_], sentence: &str| assert_eq!(told(objects).to_string(), sentence);
        says(&[ring], "The picture shows a red ring at the top left.");
        says(&[star, ring], "The picture shows a red ring at the top left and an orange star at the top right.");
        says(
            &[cross, star, ring],
            "The picture shows a red ring at the top left, an orange star at the top right and a cross at the bottom left.",
        );
    }

    #[test]
    fn only_the_same_set_is_the_same_description() {
        let right = Description::parse("The picture shows a red ring at the top left and a cross at the bottom left.");
        let is_right = |sentence: &str| {
            let told = Description::parse(sentence);
            told.is_some() && told == right
        };
        assert!(is_right("the picture shows a cross at the bottom left, and a red ring at the top left"));
        for wrong in [
            "The picture shows a red ring at the top left.",
            "The picture shows a ring at the top left and a cross at the bottom left.",
            "The picture shows a red ring at the top left and a red cross at the bottom left.",
            "The picture shows a red ring at the top right and a cross at the bottom left.",
            "The picture shows a red ring at the top left, a star at the top right and a cross at the bottom left.",
        ] {
            assert!(Description::parse(wrong).is_some() && !is_right(wrong), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_description_tells_nothing() {
        for garbage in [
            "",
            "no",
            "The picture shows",
            "The picture shows.",
            "a red ring at the top left.",
            "The picture shows a red ring at the top left and",
            "The picture shows a red ring at the top left, a blue",
            "The picture shows a red ring at the top left. It is nice.",
            "The picture shows a mauve ring at the top left.",
            "The picture shows a red blue ring at the top left.",
            "The picture shows a red dog at the top left.",
            "The picture shows a red ring at the left top.",
            "The picture shows a red ring at the top left and a red ring at the top left.",
        ] {
            assert_eq!(Description::parse(garbage), None, "{garbage}");
        }
    }

    #[test]
    fn a_scene_is_read_back_from_its_sentence() {
        for (seed, split) in [7, 2024].into_iter().flat_map(|seed| Split::ALL.map(|split| (seed, split))) {
            let config = ScenesConfig {
                seed,
                colours: Colour::ALL.to_vec(),
                shapes: Shape::ALL.to_vec(),
                objects: [1.0; 3],
                lone_first: 0,
                ..ScenesConfig::default()
            };
            let scenes = Scenes::new(config, split).unwrap();
            for index in (0..200).chain([u64::MAX]) {
                let right = Description::of(&scenes.scene(index));
                assert_eq!(Description::parse(&right.to_string()).as_ref(), Some(&right));
                // The same objects in another order, and all of them but one.
                let mut phrases: Vec<String> = right.objects.iter().map(Described::to_string).collect();
                let num_objects = phrases.len();
                phrases.rotate_left(index as usize % num_objects);
                let sentence = |phrases: &[String]| format!("{OPENING} {}.", phrases.join(" and "));
                assert_eq!(Description::parse(&sentence(&phrases)), Some(right.clone()));
                assert_ne!(Description::parse(&sentence(&phrases[1..])), Some(right));
            }
        }
    }

    #[test]
    fn no_text_is_too_odd_to_read() {
        let odd = ["a", " ", ",", " and ", "a ring at the top left", "\u{130}", "\u{1f600}", "\0", "the", ".", "é"];
        let mut draw = Draw::new(1, 0, 0, Purpose::Questions);
        for _ in 0..5000 {
            let text: String = (0..draw.below(8)).map(|_| draw.pick(&odd)).collect();
            assert_eq!(Description::parse(&text), None);
            if let Some(told) = Description::parse(&format!("{OPENING} {text}")) {
                assert_eq!(Description::parse(&told.to_string()), Some(told), "{text}");
            }
        }
    }
}
