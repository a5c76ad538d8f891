//! Many pictures in one, to look at a dataset.

use image::{Rgb, RgbImage, imageops};

use super::dataset::Scenes;

impl Scenes {
    /// The first `columns * rows` pictures, each pixel of a square shown as `zoom * zoom`, with a line between them; those of
    /// other shapes fill as much of as large a square.
    pub fn contact_sheet(&self, columns: u32, rows: u32, zoom: u32) -> RgbImage {
        let side = self.config.image_size * zoom;
        let pitch = side + 2;
        let mut sheet = RgbImage::from_pixel(columns * pitch, rows * pitch, Rgb([255; 3]));
        for index in 0..columns * rows {
            let picture = self.render(index.into());
            let longest = picture.width().max(picture.height());
            let [width, height] = [picture.width(), picture.height()].map(|length| length * side / longest);
            let picture = imageops::resize(&picture, width, height, imageops::FilterType::Nearest);
            imageops::replace(&mut sheet, &picture, (index % columns * pitch).into(), (index / columns * pitch).into());
        }
        sheet
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ScenesConfig, Split};
    use super::*;

    #[test]
    fn the_sheet_holds_the_pictures() {
        let scenes = Scenes::new(ScenesConfig::default(), Split::Test).unwrap();
        let sheet = scenes.contact_sheet(3, 2, 2);
        assert_eq!(sheet.dimensions(), (3 * 114, 2 * 114));
        assert_eq!(sheet.get_pixel(114 + 2 * 10, 114 + 2 * 20), scenes.render(4).get_pixel(10, 20));
    }
}
