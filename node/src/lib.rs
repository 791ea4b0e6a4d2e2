//! `wgkex-node`: what runs at the far end of a tunnel. It leases an address of each server of a list from the registry of a
//! broker, and writes a file for `wg-quick` of each.
//!
//! No task: a command that ends when it is done. [`command`] goes through the servers; [`registry`] speaks to the broker;
//! [`tunnel`] checks what it answers and makes the file of it, without IO; [`files`] writes that. Nothing that comes from a broker
//! gets into a file unchecked, since `wg-quick` runs commands that stand there, as root.

pub mod command;
mod files;
mod registry;
mod tunnel;
