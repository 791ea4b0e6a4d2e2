//! `wgkex-node`: the client end of a tunnel. It leases an address of each server of a list from the registry of a
//! broker, and writes a `wg-quick` file for each.
//!
//! No task: a command that ends when it is done. [`lease`] iterates over the servers; [`registry`] calls the broker;
//! [`tunnel`] validates the broker's answer and renders the file, without IO; [`files`] writes the file. Nothing that a
//! broker sends gets into a file unchecked, since `wg-quick` runs commands in that file as root.

mod files;
pub mod lease;
mod registry;
mod tunnel;
