//! A box in a picture as text tells it, in thousandths of the picture's sides, the way Qwen-VL writes one:
//! `<box>(x1,y1),(x2,y2)</box>`.

use std::fmt;

use anyhow::{Result, ensure};
use image::{Rgb, RgbImage};

/// The upper left and the lower right corner of a box that lies in its picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoundingBox {
    corners: [u16; 4], // x1, y1, x2, y2 in thousandths
}

/// The lower right corner of a picture.
const WHOLE: i64 = 1000;
/// What stands around a box in text.
const TAGS: [&str; 2] = ["<box>", "</box>"];
/// The least IoU of two boxes that are taken to be the same.
const SAME: f64 = 0.5;
/// The colours that boxes are drawn in, by turns.
const COLOURS: [Rgb<u8>; 4] = [Rgb([255, 64, 32]), Rgb([0, 150, 255]), Rgb([255, 200, 0]), Rgb([170, 60, 220])];

impl BoundingBox {
    /// From `x1, y1, x2, y2`, in thousandths of the width and the height.
    ///
    /// # Errors
    /// Where the box holds nothing, or reaches outside the picture.
    pub fn new(corners: [i64; 4]) -> Result<Self> {
        let [x1, y1, x2, y2] = corners;
        ensure!(
            corners.iter().all(|place| (0..=WHOLE).contains(place)),
            "the box ({x1},{y1}),({x2},{y2}) reaches outside the picture, which goes from (0,0) to ({WHOLE},{WHOLE})"
        );
        ensure!(
            x1 < x2 && y1 < y2,
            "the box ({x1},{y1}),({x2},{y2}) holds nothing: its first corner is the upper left one"
        );
        Ok(Self { corners: corners.map(|place| place as u16) })
    }

    /// Its corners, `x1, y1, x2, y2` in thousandths.
    pub fn corners(&self) -> [u16; 4] {
        self.corners
    }

    /// Every box that a text tells. What stands between two tags and is no four numbers is passed over, as words are.
    ///
    /// # Errors
    /// Where one is none that a picture has ([`BoundingBox::new`]).
    pub fn all_in(text: &str) -> Result<Vec<Self>> {
        let [begin, end] = TAGS;
        let told = text.split(begin).skip(1).filter_map(|rest| corners_of(rest.split_once(end)?.0));
        told.map(Self::new).collect()
    }

    /// Whether both texts tell the same boxes, at least one: as many, and each of the one at an IoU of 0.5 or more with one of
    /// the other.
    pub fn same_in(text: &str, other: &str) -> bool {
        let (Ok(found), Ok(mut left)) = (Self::all_in(text), Self::all_in(other)) else { return false };
        let as_many = found.len() == left.len();
        let is_told = |told: &Self| {
            let place = left.iter().position(|other| told.iou(other) >= SAME);
            place.map(|place| left.swap_remove(place)).is_some()
        };
        !found.is_empty() && as_many && found.iter().all(is_told)
    }

    /// The area of both over the area of either.
    pub fn iou(&self, other: &Self) -> f64 {
        let area = |[x1, y1, x2, y2]: [u16; 4]| f64::from(x2.saturating_sub(x1)) * f64::from(y2.saturating_sub(y1));
        let ([a1, b1, a2, b2], [x1, y1, x2, y2]) = (self.corners, other.corners);
        let both = area([a1.max(x1), b1.max(y1), a2.min(x2), b2.min(y2)]);
        both / (area(self.corners) + area(other.corners) - both)
    }

    /// Draws the edges of boxes into a picture, each in a colour of its own.
    pub fn draw(boxes: &[Self], picture: &mut RgbImage) {
        let (width, height) = picture.dimensions();
        let thick = width.max(height).div_ceil(150);
        for (each, colour) in boxes.iter().zip(COLOURS.into_iter().cycle()) {
            let at = |place: u16, side: u32| (u64::from(place) * u64::from(side) / WHOLE as u64) as u32;
            let [x1, y1, x2, y2] = each.corners;
            let (left, right) = (at(x1, width), at(x2, width).max(at(x1, width) + 1).min(width));
            let (top, bottom) = (at(y1, height), at(y2, height).max(at(y1, height) + 1).min(height));
            for y in top..bottom {
                for x in left..right {
                    let inside = (x - left).min(right - 1 - x).min(y - top).min(bottom - 1 - y);
                    if inside < thick {
                        picture.put_pixel(x, y, colour);
                    }
                }
            }
        }
    }
}

impl fmt::Display for BoundingBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([begin, end], [x1, y1, x2, y2]) = (TAGS, self.corners);
        write!(f, "{begin}({x1},{y1}),({x2},{y2}){end}")
    }
}

/// `(x1,y1),(x2,y2)`, with spaces or without.
fn corners_of(text: &str) -> Option<[i64; 4]> {
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let (first, second) = text.strip_prefix('(')?.strip_suffix(')')?.split_once("),(")?;
    let ((x1, y1), (x2, y2)) = (first.split_once(',')?, second.split_once(',')?);
    Some([x1.parse().ok()?, y1.parse().ok()?, x2.parse().ok()?, y2.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounding_box(corners: [i64; 4]) -> BoundingBox {
        BoundingBox::new(corners).unwrap()
    }

    #[test]
    fn boxes_are_read_as_they_are_written() {
        let boxes = [bounding_box([0, 20, 500, 1000]), bounding_box([7, 8, 9, 10])];
        let text = format!("A ring {} and a cross {}.", boxes[0], boxes[1]);
        assert_eq!(text, "A ring <box>(0,20),(500,1000)</box> and a cross <box>(7,8),(9,10)</box>.");
        assert_eq!(BoundingBox::all_in(&text).unwrap(), boxes);
        assert_eq!(BoundingBox::all_in("<box> ( 7, 8 ), ( 9, 10 ) </box>").unwrap(), boxes[1..]);
        for none in ["", "red", "<box>red</box>", "<box>(1,2),(3,4)", "(1,2),(3,4)", "<box>(1,2),(3)</box>"] {
            assert_eq!(BoundingBox::all_in(none).unwrap(), [], "{none}");
        }
    }

    #[test]
    fn a_box_outside_its_picture_is_told_of() {
        let error = |text: &str| BoundingBox::all_in(text).unwrap_err().to_string();
        assert_eq!(
            error("<box>(900,10),(1200,40)</box>"),
            "the box (900,10),(1200,40) reaches outside the picture, which goes from (0,0) to (1000,1000)"
        );
        assert!(error("<box>(-1,10),(100,40)</box>").contains("reaches outside the picture"));
        assert!(error("<box>(50,10),(50,40)</box>").contains("(50,10),(50,40) holds nothing"));
    }

    #[test]
    fn the_same_box_covers_half_of_both() {
        let whole = bounding_box([0, 0, 1000, 1000]);
        assert_eq!(whole.iou(&bounding_box([0, 0, 1000, 500])), 0.5);
        assert_eq!(bounding_box([0, 0, 10, 10]).iou(&bounding_box([10, 0, 20, 10])), 0.0);
        assert!((bounding_box([0, 0, 20, 20]).iou(&bounding_box([10, 10, 30, 30])) - 100.0 / 700.0).abs() < 1e-12);
        let same = |a: &str, b: &str| BoundingBox::same_in(a, b);
        assert!(same("<box>(0,0),(1000,1000)</box>", "It is <box>(0,0),(1000,500)</box>."));
        assert!(!same("<box>(0,0),(1000,1000)</box>", "<box>(0,0),(1000,499)</box>"));
        let two = "<box>(0,0),(100,100)</box><box>(500,500),(900,900)</box>";
        assert!(same(two, "<box>(510,500),(900,900)</box> <box>(0,0),(100,90)</box>"));
        assert!(!same(two, "<box>(0,0),(100,100)</box>") && !same("red", "red"));
        assert!(!same("<box>(0,0),(1000,1001)</box>", "<box>(0,0),(1000,1000)</box>"));
    }

    #[test]
    fn edges_are_drawn_and_nothing_else() {
        let mut picture = RgbImage::new(20, 10);
        BoundingBox::draw(&[bounding_box([250, 200, 750, 800]), bounding_box([999, 999, 1000, 1000])], &mut picture);
        let is_drawn = |x, y| picture.get_pixel(x, y).0 != [0; 3];
        assert!(is_drawn(5, 2) && is_drawn(14, 7) && is_drawn(5, 5) && is_drawn(19, 9));
        assert!(!is_drawn(6, 3) && !is_drawn(15, 5) && !is_drawn(4, 5) && !is_drawn(18, 9));
    }
}
