"""Changes the owners of a tree to users that this machine does not have: python3 foreign-owners.py DIRECTORY

Each owner's number becomes that many after the first of 65,536 that no user of a machine has: outside of what systemd and /etc/subuid
give out. A Sprite's root is the first of them.
"""

import os
import stat
import sys

FIRST = 1_895_825_408


def give(path):
    found = os.lstat(path)
    os.lchown(path, FIRST + found.st_uid, FIRST + found.st_gid)
    # A change of the owner takes set-user-ID bits away.
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(path, stat.S_IMODE(found.st_mode))


root, several_names = sys.argv[1], set()
for directory, directories, files in os.walk(root):
    for name in directories + files:
        path = os.path.join(directory, name)
        found = os.lstat(path)
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in several_names:
                continue
            several_names.add(found.st_ino)
        give(path)
give(root)
