//! A wrong answer beside the right one, for preferences.

use vora_image::BoundingBox;

use super::dataset::Scenes;
use super::draw::{Draw, Purpose};
use super::question::{Question, whole_scene};
use super::question_kind::QuestionKind;
use super::scene::{Object, Quarter, Scene};

impl Scenes {
    /// [`Scenes::questions`], each with a wrong answer of its question type: another colour, shape, place or number, the
    /// other of yes and no, the box in the mirror, a caption or description with one attribute of one object changed. No
    /// wrong answer gives an object a colour and a shape that training is never to name together.
    pub fn pairs(&self, index: u64) -> Vec<(Question, String)> {
        let draw = &mut Draw::new(self.config.seed, self.split.stream(), index, Purpose::Rejected);
        let scene = self.scene(index);
        let pair = |asked: Question| {
            let wrong = self.wrong(&scene, &asked, draw);
            (asked, wrong)
        };
        self.questions(index).into_iter().map(pair).collect()
    }

    fn wrong(&self, scene: &Scene, asked: &Question, draw: &mut Draw) -> String {
        let object = |is_meant: &dyn Fn(&Object) -> bool| {
            scene.objects.iter().find(|object| is_meant(object)).expect("a question is about an object of its scene")
        };
        let name = match asked.kind {
            QuestionKind::Colour => {
                let object = object(&|object| object.colour.is_some_and(|colour| colour.name() == asked.answer));
                draw.pick(&self.other_colours(object)).name()
            }
            QuestionKind::Shape => {
                let object = object(&|object| object.shape.name() == asked.answer);
                draw.pick(&self.other_shapes(object)).name()
            }
            QuestionKind::Where => draw.pick(&other(Quarter::ALL.map(Quarter::name), &asked.answer)),
            QuestionKind::HowMany => draw.pick(&other(["one", "two", "three"], &asked.answer)),
            QuestionKind::YesNo => draw.pick(&other(["yes", "no"], &asked.answer)),
            QuestionKind::Box => return mirrored(&asked.answer),
            QuestionKind::Caption | QuestionKind::Describe => {
                let mut changed = scene.clone();
                self.change(&mut changed, draw);
                return whole_scene(&changed, asked.kind);
            }
        };
        name.to_owned()
    }

    /// Gives one object another colour, where its own has a name, or another shape, or another place.
    fn change(&self, scene: &mut Scene, draw: &mut Draw) {
        let taken: Vec<Quarter> = scene.objects.iter().map(|object| object.quarter).collect();
        let idx = draw.below(scene.objects.len());
        let object = &mut scene.objects[idx];
        match draw.below(if object.colour.is_some() { 3 } else { 2 }) {
            0 => object.shape = draw.pick(&self.other_shapes(object)),
            1 => {
                let free: Vec<_> = Quarter::ALL.into_iter().filter(|quarter| !taken.contains(quarter)).collect();
                object.quarter = draw.pick(&free);
            }
            _ => object.colour = Some(draw.pick(&self.other_colours(object))),
        }
    }

    /// Colours that it has not, and that training may name with its shape: more than half of them.
    fn other_colours(&self, object: &Object) -> Vec<super::Colour> {
        let is_other = |colour: &super::Colour| {
            object.colour != Some(*colour) && !self.held_out.contains(&(*colour, object.shape))
        };
        self.colours().iter().copied().filter(is_other).collect()
    }

    /// Shapes that it has not, and that training may name with its colour.
    fn other_shapes(&self, object: &Object) -> Vec<super::Shape> {
        let is_held_out = |shape| object.colour.is_some_and(|colour| self.held_out.contains(&(colour, shape)));
        let is_other = |shape: &super::Shape| object.shape != *shape && !is_held_out(*shape);
        self.shapes().iter().copied().filter(is_other).collect()
    }
}

/// The boxes of an answer as they would be in a picture turned round.
fn mirrored(answer: &str) -> String {
    let boxes = BoundingBox::all_in(answer).unwrap_or_default();
    let turned = boxes.iter().map(|each| {
        let [x1, y1, x2, y2] = each.corners().map(|place| 1000 - i64::from(place));
        BoundingBox::new([x2, y2, x1, y1]).map_or_else(|_| String::new(), |turned| turned.to_string())
    });
    turned.collect()
}

fn other<const N: usize>(names: [&'static str; N], right: &str) -> Vec<&'static str> {
    names.into_iter().filter(|name| *name != right).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{Description, ScenesConfig, Split};
    use super::*;

    fn scenes(split: Split) -> Scenes {
        let config = ScenesConfig {
            questions_per_image: 20,
            named_share: 0.3,
            lone_first: 0,
            objects: [1.0; 3],
            kinds: QuestionKind::ALL.map(|kind| (kind, 1.0)).into(),
            kinds_of_several: None,
            ..ScenesConfig::default()
        };
        Scenes::new(config, split).unwrap()
    }

    #[test]
    fn a_wrong_answer_is_wrong_and_of_its_question_type() {
        let mut seen = HashSet::new();
        for split in [Split::Train, Split::Unseen] {
            let scenes = scenes(split);
            let all_of = |kind: QuestionKind| -> Vec<&str> {
                match kind {
                    QuestionKind::Colour => scenes.colours().iter().map(|colour| colour.name()).collect(),
                    QuestionKind::Shape => scenes.shapes().iter().map(|shape| shape.name()).collect(),
                    QuestionKind::Where => Quarter::ALL.map(Quarter::name).to_vec(),
                    QuestionKind::HowMany => vec!["one", "two", "three"],
                    _ => vec!["yes", "no"],
                }
            };
            for index in 0..500 {
                let pairs = scenes.pairs(index);
                assert_eq!(pairs, scenes.pairs(index));
                assert!(pairs.iter().map(|pair| &pair.0).eq(&scenes.questions(index)));
                for (Question { kind, question, answer }, wrong) in &pairs {
                    seen.insert((*kind, wrong.clone()));
                    assert_ne!(answer, wrong, "{question}");
                    match kind {
                        QuestionKind::Caption => {
                            let differ = answer.split(", ").filter(|phrase| !wrong.split(", ").any(|w| w == *phrase));
                            assert_eq!(differ.count(), 1, "{answer}; {wrong}");
                        }
                        QuestionKind::Describe => {
                            let [right, wrong] = [answer, wrong].map(|text| Description::parse(text).unwrap());
                            assert_eq!(right.num_shared(&wrong) + 1, scenes.scene(index).objects.len());
                        }
                        QuestionKind::Box => assert!(!BoundingBox::same_in(answer, wrong), "{answer}; {wrong}"),
                        _ => assert!(all_of(*kind).contains(&wrong.as_str()), "{wrong}"),
                    }
                    // What a wrong answer joins is nothing that the split `unseen` will ask for.
                    for (colour, shape) in &scenes.held_out {
                        let pair = format!("{} {}", colour.name(), shape.name());
                        assert!(split == Split::Unseen || !format!("{question} {wrong}").contains(&pair), "{wrong}");
                    }
                }
            }
        }
        let all: HashSet<_> = seen.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(all.len(), QuestionKind::ALL.len());
        assert_eq!(seen.iter().filter(|(kind, _)| *kind == QuestionKind::Where).count(), 4);
    }
}
