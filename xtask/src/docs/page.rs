//! The page of a file's keys, in Markdown.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::default::Default;
use super::schema::{Key, Schema, Section};
use super::shape::{Shape, Word};

const HEAD: &str = "\
# The run file

One YAML file is one run: `vora train --config FILE`, and `--set a.b=c` for single keys. An unknown key is refused with line
and column. The keys are those of the published VoRA recipes and of HF's `TrainingArguments`, which load as they are, and
our own beside them. A key without a default must be there; where the default is a dash, leaving the key out means what
its description says.

This page is written by `cargo xtask docs` from the types that read the file
([`crates/vora-recipe/src`](../crates/vora-recipe/src)) and their doc comments: change those, and run it again.
";

/// Writes a section after the other, each at the first key that holds it.
pub fn write(schema: &Schema) -> Result<String> {
    let of: BTreeMap<&str, &Section> = schema.sections.iter().map(|section| (section.of.as_str(), section)).collect();
    let root = schema.sections.first().context("the file has no keys")?;
    let mut page = Page { of, places: BTreeMap::new(), text: HEAD.to_owned() };
    page.find_places(root, "");
    let mut places: Vec<_> =
        page.places.iter().map(|(of, (number, path))| (*number, of.clone(), path.clone())).collect();
    places.sort();
    page.section(root, "");
    for (_, of, path) in places {
        let section = page.of[of.as_str()];
        page.section(section, &path);
    }
    Ok(page.text)
}

struct Page<'a> {
    of: BTreeMap<&'a str, &'a Section>,
    /// Where each section but the root stands, by its type: its number on the page, and its path in the file.
    places: BTreeMap<String, (usize, String)>,
    text: String,
}

impl<'a> Page<'a> {
    fn find_places(&mut self, section: &'a Section, path: &str) {
        let keys = section.keys.iter().chain(section.variants.iter().flat_map(|variant| &variant.keys));
        for key in keys {
            let path = if path.is_empty() { key.name.clone() } else { format!("{path}.{}", key.name) };
            self.find_in(&key.shape, path);
        }
    }

    fn find_in(&mut self, shape: &Shape, path: String) {
        match shape {
            Shape::Section(of) if !self.places.contains_key(of) => {
                self.places.insert(of.clone(), (self.places.len(), path.clone()));
                if let Some(section) = self.of.get(of.as_str()).copied() {
                    self.find_places(section, &path);
                }
            }
            Shape::List(inside, _) => self.find_in(inside, path + "[]"),
            Shape::Map(_, inside) => self.find_in(inside, path + ".NAME"),
            Shape::Either(shapes) => shapes.iter().for_each(|shape| self.find_in(shape, path.clone())),
            _ => {}
        }
    }

    fn section(&mut self, section: &Section, path: &str) {
        if !path.is_empty() {
            self.text += &format!("\n## `{path}`\n\n{}\n", section.doc);
        }
        self.table(&section.keys);
        for variant in &section.variants {
            self.text += &format!("\n### `{}: {}`\n\n{}\n", variant.tag, variant.name, variant.doc);
            self.table(&variant.keys);
        }
    }

    fn table(&mut self, keys: &[Key]) {
        if keys.is_empty() {
            return;
        }
        let mut text = "\n| key | value | default | |\n| --- | --- | --- | --- |\n".to_owned();
        for Key { name, aliases, shape, default, doc } in keys {
            let names: Vec<_> = [name].into_iter().chain(aliases).map(|name| format!("`{name}`")).collect();
            let default = match default {
                Default::Required => String::new(),
                Default::Absent => "-".to_owned(),
                Default::Value(value) => format!("`{value}`"),
                Default::Said(words) => words.clone(),
                Default::Own => "its own".to_owned(),
            };
            let mut cells = [names.join(" or "), self.value(shape, false), default, doc.clone()];
            for word in words(shape).filter(|word| !word.doc.is_empty()) {
                cells[3] += &format!("<br>`{}`: {}", word.name, word.doc);
            }
            text += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
        }
        self.text += &text;
    }

    /// The values of a key, in words.
    fn value(&self, shape: &Shape, many: bool) -> String {
        let number = |one: &str| if many { format!("{one}s") } else { one.to_owned() };
        match shape {
            Shape::Flag => "`true` or `false`".to_owned(),
            Shape::Integer => number("integer"),
            Shape::Number => number("number"),
            Shape::Text => number("text"),
            Shape::Path => number("path"),
            Shape::Words(words) => {
                let names: Vec<_> = words.iter().map(|word| format!("`{}`", word.name)).collect();
                names.join(", ")
            }
            Shape::List(inside, None) => format!("{} of {}", number("list"), self.value(inside, true)),
            Shape::List(inside, Some(len)) => format!("{} of {len} {}", number("list"), self.value(inside, true)),
            Shape::Map(key, value) => {
                format!("{} from {} to {}", number("map"), self.value(key, false), self.value(value, false))
            }
            Shape::Section(of) => {
                let path = self.places.get(of).map(|(_, path)| path.as_str()).unwrap_or_default();
                format!("[{}](#{})", number("section"), slug(path))
            }
            Shape::Either(shapes) => {
                shapes.iter().map(|shape| self.value(shape, many)).collect::<Vec<_>>().join(", or ")
            }
        }
    }
}

/// The words that a value may be, alone or in a list or map.
fn words(shape: &Shape) -> Box<dyn Iterator<Item = &Word> + '_> {
    match shape {
        Shape::Words(words) => Box::new(words.iter()),
        Shape::List(inside, _) => words(inside),
        Shape::Map(key, value) => Box::new(words(key).chain(words(value))),
        _ => Box::new(std::iter::empty()),
    }
}

/// A heading as links name it.
fn slug(heading: &str) -> String {
    heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || "_-".contains(*c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, shape: Shape, default: Default) -> Key {
        Key { name: name.into(), aliases: Vec::new(), shape, default, doc: format!("The {name}|.") }
    }

    #[test]
    fn each_section_stands_once_and_is_linked() {
        let section = |of: &str, keys| Section { of: of.into(), doc: format!("Of {of}."), keys, variants: Vec::new() };
        let inner = || Shape::Section("Inner".into());
        let word = Word { name: "pad".into(), doc: "Bars.".into(), default: false };
        let schema = Schema {
            sections: vec![
                section(
                    "Root",
                    vec![
                        key("first", Shape::List(Box::new(inner()), None), Default::Required),
                        key("again", inner(), Default::Own),
                    ],
                ),
                section("Inner", vec![key("ratio_x", Shape::Words(vec![word]), Default::Value("pad".into()))]),
            ],
        };
        let page = write(&schema).unwrap();
        let rows: Vec<_> = page.lines().filter(|line| line.starts_with('|') && !line.contains("---")).collect();
        assert_eq!(
            rows,
            [
                "| key | value | default | |",
                "| `first` | list of [sections](#first) |  | The first\\|. |",
                "| `again` | [section](#first) | its own | The again\\|. |",
                "| key | value | default | |",
                "| `ratio_x` | `pad` | `pad` | The ratio_x\\|.<br>`pad`: Bars. |",
            ]
        );
        assert!(page.contains("\n## `first[]`\n\nOf Inner.\n"), "{page}");
    }
}
