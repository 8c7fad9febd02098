//! Pictures as files: the same drawing as SVG, and as PNG with a font of our own.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Once;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use plotters::coord::Shift;
use plotters::prelude::{
    BitMapBackend, DrawingArea, DrawingBackend, IntoDrawingArea as _, SVGBackend, WHITE,
};
use plotters::style::{FontStyle, register_font};

use super::RunError;

/// The letters of the pictures: a part of DejaVu Sans. The system need not have any font.
static FONT: &[u8] = include_bytes!("font/DejaVuSans-subset.ttf");

/// Something that can be drawn on an area.
pub(super) trait Picture {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws it.
    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Result<(), RunError>;
}

/// Writes `DIR/NAME.svg` and `DIR/NAME.png`.
pub(super) fn write(picture: &impl Picture, directory: &Path, name: &str) -> Result<(), RunError> {
    static REGISTER: Once = Once::new();
    REGISTER.call_once(|| {
        let registered = register_font("sans-serif", FontStyle::Normal, FONT);
        assert!(registered.is_ok(), "the font is a part of this program");
    });
    let (width, height) = picture.size();
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RunError::Write { path, source }
    };
    let mut svg = String::new();
    draw(picture, SVGBackend::with_string(&mut svg, (width, height)))?;
    let path = directory.join(format!("{name}.svg"));
    fs::write(&path, svg).map_err(failed(&path))?;

    let mut pixels = vec![0; 3 * width as usize * height as usize];
    draw(
        picture,
        BitMapBackend::with_buffer(&mut pixels, (width, height)),
    )?;
    let path = directory.join(format!("{name}.png"));
    write_png(&path, &pixels, (width, height)).map_err(failed(&path))
}

fn draw(picture: &impl Picture, backend: impl DrawingBackend) -> Result<(), RunError> {
    let area = backend.into_drawing_area();
    area.fill(&WHITE).map_err(undrawn)?;
    picture.draw(&area)?;
    area.present().map_err(undrawn)
}

pub(super) fn undrawn(error: impl std::fmt::Display) -> RunError {
    RunError::Draw {
        reason: error.to_string(),
    }
}

/// Writes an image as RFC 2083 says. `pixels` has red, green and blue of each pixel, row by row.
fn write_png(path: &Path, pixels: &[u8], (width, height): (u32, u32)) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(b"\x89PNG\r\n\x1a\n")?;
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    // Eight bits for each of red, green and blue; no interlacing.
    header.extend([8, 2, 0, 0, 0]);
    write_chunk(&mut file, *b"IHDR", &header)?;
    let mut data = ZlibEncoder::new(Vec::new(), Compression::default());
    for row in pixels.chunks_exact(3 * width as usize) {
        // The row is not filtered.
        data.write_all(&[0])?;
        data.write_all(row)?;
    }
    write_chunk(&mut file, *b"IDAT", &data.finish()?)?;
    write_chunk(&mut file, *b"IEND", &[])?;
    file.flush()
}

fn write_chunk(file: &mut impl Write, kind: [u8; 4], data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&kind);
    checksum.update(data);
    file.write_all(&len.to_be_bytes())?;
    file.write_all(&kind)?;
    file.write_all(data)?;
    file.write_all(&checksum.finalize().to_be_bytes())
}
