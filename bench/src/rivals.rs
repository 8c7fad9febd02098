//! The virtual environment that the rivals run in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where the environment is unless the user says otherwise: in the user's cache.
pub(crate) fn default_environment() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(home).unwrap_or_else(std::env::temp_dir);
    cache.join("ps").join("bench-venv")
}

/// Installs what `requirements` names, unless it is there already, and returns the interpreter.
pub(crate) fn install(environment: &Path, requirements: &Path) -> Result<PathBuf> {
    let wanted = fs::read_to_string(requirements)
        .with_context(|| format!("{} cannot be read", requirements.display()))?;
    let python = environment.join("bin").join("python");
    let installed = environment.join("installed.txt");
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    let place = environment.display();
    eprintln!("Installing the rivals into {place}: several gigabytes, once.");
    if !python.exists() {
        let mut venv = Command::new("python3");
        succeed(venv.args(["-m", "venv"]).arg(environment))?;
    }
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "-r"]);
    succeed(pip.arg(requirements))?;
    fs::write(installed, wanted)?;
    Ok(python)
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status();
    let status = status.with_context(|| format!("{command:?} cannot be started"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
